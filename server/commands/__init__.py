"""The commands of `foldserve`, one per file of the same name, whose `add` declares it on its parser."""

ALL = {
    "serve": "start the server",
    "batch": "answer a file of requests, without a server",
    "doctor": "say whether and how a server with these options would run here",
    "gpu-check": "say whether this machine's GPU computes what it should, and what reduction gains there",
    "calibrate": "find the withdrawal layer of a model",
    "evaluate": "measure accuracy against vision tokens",
    "analyze": "show where a model can do with fewer vision tokens",
    "map": "draw where an image's vision tokens go",
    "loadtest": "measure throughput against the reduction ratio",
    "report": "make the page of finished measurements again, or compare two",
    "convert": "bring a checkpoint into the layout that is served",
    "demo-model": "copy the demo model into a directory, for other programs",
    "hash-key": "make an API key",
}
