"""`foldserve evaluate`: what a reduction costs in answers, measured through the engine that serves them."""
