"""`python -m foldserve.loadtest.soak`: many mixed requests, many of them broken off, and nothing may be left over."""
