"""Run the checks of some clients in one process and print {client: {check: result}} as the last line.

    python run.py http://127.0.0.1:8000/v1 langchain litellm ...

A result is {"failed": why} where a check raised; a client is {"missing": why} where its package is.
"""

import importlib
import json
import sys

results = {}
for name in sys.argv[2:]:
    try:
        checks = importlib.import_module(f"{name}_client").CHECKS
    except ImportError as error:
        results[name] = {"missing": str(error)}
        continue
    results[name] = {}
    for check, run in checks.items():
        try:
            results[name][check] = run()
        except Exception as error:
            results[name][check] = {"failed": f"{type(error).__name__}: {error}"[:500]}
print(json.dumps(results))
