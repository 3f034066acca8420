"""`foldserve analyze`: three label-free studies that show where in a model its vision tokens can be reduced."""
