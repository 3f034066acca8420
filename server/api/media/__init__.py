"""Images and videos of requests, fetched and decoded under limits before vLLM sees the messages.

address.py   which hosts and addresses may be fetched from
names.py     DNS
fetch.py     HTTP: connects to the checked address, follows redirects one checked step at a time
data_url.py  `data:` URLs
jpeg.py, png.py, webp.py   the parts of a file that make pixels; stripped.py and orientation.py are shared
decode.py    file -> pixels, in the mode that convert.py makes
budget.py    limits over all images of a request
pixel_memory.py   limit on the memory of all requests' images; memory.py returns it to the system
fair_threads.py   threads that decode, in turn
places.py    where images stand in a chat's messages
guard.py     a chat's messages -> the same messages with decoded images in them
"""
