"""The commands of `vla-adapter`, one file per subject. Each fills in settings and calls a function of the package."""
