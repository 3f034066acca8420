"""Images that requests bring: fetched and decoded under bounds, before vLLM sees the messages.

address.py   which hosts and addresses may be asked
fetch.py     HTTP: connects to the address that was checked, follows redirects one checked step at a time
data_url.py  `data:` URLs
decode.py    file -> RGB pixels
budget.py    what all images of a request may cost together, and of all requests at once
places.py    where images stand in a chat's messages
guard.py     a chat's messages -> the same messages with decoded images in them
"""
