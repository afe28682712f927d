"""What people run beside a mount: exerciser, comparison, benchmarks, the demo."""
