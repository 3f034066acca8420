"""`GET /playground`: a page to try the server with. Its files in `page/` are served as they are; there is no build."""
