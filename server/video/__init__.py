"""Frames of a video file from a stranger, decoded in a process that can do nothing else.

frames.py   what is asked of a file, and what comes of it
file.py     a file's frames under bounds; runs in a process of its own
nursery.py  the process that forks one for each file
decoder.py  asks for frames, in the server's process
"""
