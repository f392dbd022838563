def register():
    return
