# Keyrings belong to users and sessions, of all namespaces.
def attempt():
    call(250, 0, -2, 1)
