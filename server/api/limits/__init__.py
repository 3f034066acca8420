"""What a chat request may ask for, checked as early as possible.

route.py           reads the body: counts it while it arrives, and checks it before FastAPI sees it
coding.py          compressed bodies
strict_json.py     bytes -> JSON without duplicate keys, NaN, deep nesting
body.py            refusals that depend on the JSON alone: parts, number of images, fields that are not a client's
fields.py          bounds on numbers and lists, once pydantic has read them
misplaced.py       keys that would be ignored, and media that the model would not see
template.py        which message a chat template refuses
special_tokens.py  texts that would tokenize to control tokens or image placeholders
checks.py          all of these for one served model
"""
