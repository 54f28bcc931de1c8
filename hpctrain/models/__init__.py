"""Models, one file each; a user's own module needs no place here."""
