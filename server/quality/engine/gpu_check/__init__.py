"""The jobs of `foldserve gpu-check`: a module each, with `run(spec)`, and `__main__`, which a process starts with."""
