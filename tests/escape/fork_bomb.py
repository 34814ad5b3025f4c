# More processes at one time than the configuration has.
def attempt():
    children = []
    try:
        for _ in range(40):
            child = os.fork()
            if child == 0:
                time.sleep(10)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
