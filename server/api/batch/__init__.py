"""`foldserve batch`: answers a file of requests by the server's own application, without a socket.

lines.py    one line of the input: OpenAI's batch format
survey.py   checks the whole input before the run: how many lines, and each `custom_id` once
files.py    `file:` URLs under the operator's folder
front.py    the application, called in this process
results.py  the output, valid even after a killed run
run.py      requests in flight, progress, the end
"""
