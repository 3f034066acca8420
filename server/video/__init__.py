"""Decodes frames of untrusted video files in processes that can do nothing else.

frames.py   what is asked of a file, and the result
file.py     a file's frames under bounds; runs in a process of its own
fork_server.py  the process that forks one process per file
decoder.py  asks for frames, in the server's process
"""
