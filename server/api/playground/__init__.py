"""`GET /playground`: a page to try the server with. Its files in `page/` are served unchanged, without a build."""
