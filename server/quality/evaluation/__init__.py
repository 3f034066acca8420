"""`foldserve evaluate`: what a reduction costs in right answers, measured with the engine that serves."""
