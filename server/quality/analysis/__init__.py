"""`foldserve analyze`: three studies of a model that need no labels and show where reduction is safe on it."""
