"""How the small models shipped in ``zoo/emoji64`` were made; each module is a resumable command."""
