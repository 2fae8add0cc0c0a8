"""Tools built on the rest of the package, which never imports them: plan, ablate, report, checks."""
