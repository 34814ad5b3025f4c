def attempt():
    os.kill(p["victim"]["pid"], 0)
