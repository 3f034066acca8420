"""The model families that foldserve reduces, one file each; `registry` lists them."""
