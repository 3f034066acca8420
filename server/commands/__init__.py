"""The commands of `foldserve`, one a file: `add` declares its arguments, and they name the function that runs it."""

from foldserve.server.commands import analyze, calibrate, convert, demo_model, evaluate, hash_key, loadtest, serve

ALL = (serve, calibrate, evaluate, analyze, loadtest, convert, demo_model, hash_key)
