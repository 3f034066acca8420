"""Soak test, `python -m foldserve.loadtest.soak`: after many mixed, often aborted requests nothing may be left over."""
