"""`foldserve doctor`: `machine` and `examine` find facts and problems, `table` shows them."""
