"""Pages of docs/reference that are read off the code: `make reference` writes them, a test says what has drifted."""
