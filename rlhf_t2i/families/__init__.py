"""Model families: how a diffusers pipeline is loaded, conditioned, called, decoded and exported."""
