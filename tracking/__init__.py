"""What run_experiment.py is made of: records of runs, supervision of main.py, TensorBoard, W&B, plots.

Imports no TensorFlow (only files behind a scheme such as gs:// need it, when they are read).
"""
