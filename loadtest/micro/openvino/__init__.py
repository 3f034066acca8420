"""OpenVINO GenAI, the other engine with a ratio per request, beside ours on one CPU."""
