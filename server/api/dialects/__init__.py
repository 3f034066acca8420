"""Other APIs of chats, served by the chat route's own path: OpenAI's Responses and Anthropic's Messages.

A request becomes the JSON of a chat request before anything of it is checked, so limits, media, planning, keys and
metrics are the chat's. Errors name the fields that the client sent. The chat's answer, or its stream, is written in the
API's form.

translation.py  a chat body, and where each of its fields came from
responses.py    `POST /v1/responses` -> chat body
messages.py     `POST /v1/messages` -> chat body
blocks.py       an answer, or a stream, as texts, reasoning and tool calls
written_*.py    these in the form of the API
schemas.py      what OpenAPI says of the bodies
route.py        the kinds of routes
"""
