"""The commands of `foldserve`, one a file: `add` declares its arguments, and they name the function that runs it."""
