"""The OpenAPI document: the stored copy is up to date, and the running server keeps what it says, whatever it is sent.

HELIOS_TEST_FUZZ: examples for each operation, 12; several hundred by hand.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.acceptance.conftest import KeyedServer
from tests.acceptance.live_server import LiveServer

SNAPSHOT = Path(__file__).parent.parent.parent / "docs" / "openapi.json"
NUM_EXAMPLES = int(os.environ.get("HELIOS_TEST_FUZZ", "12"))


def no_failure_of_ours(context: Any, answer: Any, case: Any) -> bool | None:
    """501 is an answer, where the document has it: this server does not do that. Any other 5xx is a failure."""
    return None if answer.status_code == 501 else schemathesis.checks.not_a_server_error(context, answer, case)


CHECKS = [
    no_failure_of_ours,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_stored_document_is_up_to_date(server: LiveServer) -> None:
    served = server.http.get("/openapi.json").json()
    if os.environ.get("HELIOS_WRITE_OPENAPI") == "1":
        SNAPSHOT.write_text(json.dumps(served, indent=2, ensure_ascii=False) + "\n")
    again = "run: HELIOS_WRITE_OPENAPI=1 .venv/bin/pytest tests/acceptance/test_openapi.py -k up_to_date"
    assert SNAPSHOT.is_file(), again
    assert json.loads(SNAPSHOT.read_text()) == served, f"docs/openapi.json is not what the server says; {again}"


def test_every_operation_is_what_it_says(keyed: KeyedServer) -> None:
    """No 500, no status that the document does not have, and answers that match their schemas."""
    statuses, problems = _fuzzed(keyed.capped, keyed.capped.http.get("/openapi.json").json())
    assert not problems, "\n\n".join(problems.values())
    assert sum(statuses.values()) > 200
    assert statuses[200] > 10
    assert statuses[400] > 10
    assert keyed.capped.http.get("/ready").status_code == 200


def test_a_document_that_is_wrong_is_found_out(keyed: KeyedServer) -> None:
    """The test above can fail: a status too few, and a field that the answer does not have."""
    document = keyed.capped.http.get("/openapi.json").json()
    del document["paths"]["/v1/videos/{video_id}"]["get"]["responses"]["404"]
    document["components"]["schemas"]["ModelList"]["required"].append("pages")
    document["paths"] = {path: document["paths"][path] for path in ("/v1/videos/{video_id}", "/v1/models")}
    _, problems = _fuzzed(keyed.capped, document)
    assert [*problems] == ["GET /v1/videos/{video_id} UndefinedStatusCode", "GET /v1/models JsonSchemaError"]


def _fuzzed(server: LiveServer, document: dict[str, Any]) -> tuple[Counter[int], dict[str, str]]:
    """How often each status came, and what was wrong, by operation and kind."""
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    statuses: Counter[int] = Counter()
    problems: dict[str, str] = {}
    for result in schema.get_all_operations():
        operation: Any = result
        _fuzz(operation.ok(), server.key, statuses, problems)
    return statuses, problems


def _fuzz(operation: Any, key: str, statuses: Counter[int], problems: dict[str, str]) -> None:
    """Adds to `statuses` and, by operation and kind, to `problems`."""

    @given(case=operation.as_strategy())
    @settings(
        max_examples=NUM_EXAMPLES,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def examples(case: Any) -> None:
        try:
            answer = case.call(headers={"Authorization": f"Bearer {key}"}, timeout=60)
        except (ValueError, UnicodeError):
            return  # the client library cannot write this request
        statuses[answer.status_code] += 1
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as group:
            for failure in group.exceptions:
                note = f"{operation.label}: {failure}"
                problems.setdefault(f"{operation.label} {type(failure).__name__}", note)
        except Failure as failure:
            problems.setdefault(f"{operation.label} {type(failure).__name__}", f"{operation.label}: {failure}")

    examples()
