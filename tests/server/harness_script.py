"""Run lm-evaluation-harness once with its own `hf` model and then against servers; started by a test.

Arguments: a folder of task files and a JSON list of [model, arguments, task names, whether to use the chat template].
Prints a JSON list of what was answered to every request, task by task.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

folder, runs = sys.argv[1], json.loads(sys.argv[2])
manager = TaskManager(include_path=folder, include_defaults=False)
answers = []
for model, arguments, tasks, chat in runs:
    found = lm_eval.simple_evaluate(
        model, arguments, tasks=tasks, device="cpu", task_manager=manager, apply_chat_template=chat, log_samples=True,
        batch_size=arguments.pop("batch_size", 1), bootstrap_iters=0,
    )  # fmt: skip
    answers.append({task: [sample["resps"] for sample in found["samples"][task]] for task in tasks})
sys.stdout.write("\n" + json.dumps(answers) + "\n")
