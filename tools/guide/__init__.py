"""The guide of docs/guide: its chapters as HTML and as a PDF, its pictures, and its commands."""
