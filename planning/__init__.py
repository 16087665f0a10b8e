"""--plan: what training a config on a mesh costs each device, said before anything is run; and --auto_layout."""
