"""The model executor inside other serving runtimes: one thin adapter each, over the roles that the server runs.

A composition root like `offline`: an adapter may know requests, roles and one foreign runtime. Nothing else imports
this package, and a runtime is imported only by the adapter that it has loaded itself.
"""
