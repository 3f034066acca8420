"""`foldserve batch`: a file of requests, answered by the server's own application without a socket.

lines.py    one line of the input: OpenAI's batch format
survey.py   the whole input before the run: how many lines, and each `custom_id` once
files.py    `file:` URLs under the operator's folder
front.py    the application, called in this process
results.py  the output, which a killed run leaves in order
run.py      what is in flight, the progress, the end
"""
