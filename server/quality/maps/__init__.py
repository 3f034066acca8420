"""`foldserve map`: a picture of where an image's vision tokens go."""
