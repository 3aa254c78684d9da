"""Publish a student on the Hub, with a card made from what was measured. Copy this file and edit it.

    hf auth login
    python push_student.py

`hf-kdtl push` does the same; `hf-kdtl distill --push_to_hub true` at the end of a run.
"""

from hf_kdtl.evaluation.results import read_results
from hf_kdtl.hub.model_card import student_card, with_evaluation
from hf_kdtl.hub.upload import check_access, publish
from hf_kdtl.utils.redaction import anonymous


def main(run="runs/student", repo_id="me/my-student", license="apache-2.0", evaluation=None, private=None):
    """Publish the student of a run of `hf-kdtl distill`; print and return its address."""
    results = read_results(run)
    if evaluation is not None:  # an output_dir of `hf-kdtl evaluate` of this student
        results = with_evaluation(results, read_results(evaluation))
    results = anonymous(results)  # no path and no name of this machine

    name = check_access(repo_id, private=private)  # is the token valid, and may it write there?
    card = student_card(results, model_id=name, license=license)
    commit = publish(run, name, card, results=results, private=private)
    print(commit.commit_url)
    return commit


if __name__ == "__main__":
    main()
