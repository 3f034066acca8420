"""Tables, charts and pages that all reports share. Imports nothing else of foldserve."""
