"""Images that requests bring: fetched and decoded under bounds, before vLLM sees the messages.

address.py   which hosts and addresses may be asked
names.py     DNS
fetch.py     HTTP: connects to the address that was checked, follows redirects one checked step at a time
data_url.py  `data:` URLs
jpeg.py, png.py, webp.py   what of a file makes pixels; bare.py and orientation.py are what they share
decode.py    file -> pixels, in the mode that convert.py makes
budget.py    what all images of a request may cost together
room.py      the memory that images of all requests have at once; memory.py gives it back to the system
turns.py     threads that decode, in turn
places.py    where images stand in a chat's messages
guard.py     a chat's messages -> the same messages with decoded images in them
"""
