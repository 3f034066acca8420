"""Other chat APIs, OpenAI's Responses and Anthropic's Messages, served through the chat route.

A request becomes the JSON of a chat request before anything of it is checked, so limits, media, planning, keys and
metrics are the chat's. Errors name the fields that the client sent. The chat's answer or stream is then written in the
API's form.

translation.py  a chat body, and the origin of each of its fields
responses.py    `POST /v1/responses` -> chat body
messages.py     `POST /v1/messages` -> chat body
blocks.py       an answer or a stream as texts, reasoning and tool calls
written_*.py    blocks -> the form of the API
schemas.py      OpenAPI's description of the bodies
route.py        the kinds of routes
"""
