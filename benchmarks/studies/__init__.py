"""What benchmarks/study.py is made of: tasks, methods, wrong labels, one run, measures of a trained model, reports."""
