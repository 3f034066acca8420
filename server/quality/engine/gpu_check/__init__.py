"""The jobs of `foldserve gpu-check`: one module each, with a function `run(spec)`."""
