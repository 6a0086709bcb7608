"""Makes the site's pages: those of docs/, the README, and what is generated from docstrings, configs and the command."""
