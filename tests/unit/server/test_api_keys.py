"""API keys in a file, and their limits."""

import json
import stat
import threading

import pytest

from coprs_deploy.server import api_keys
from coprs_deploy.server.api_keys import ApiKeys, KeyFile, KeyLimitError, new_key
from tests.unit.runtime_fakes import WAIT, FakePolicy
from tests.unit.server.clients import connect_to, post


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


class TestFile:
    def test_new_key_is_stored_as_its_hash(self, tmp_path):
        path = tmp_path / "keys.json"
        keys = {name: new_key(path, name) for name in ("alice", "bob@example.org")}
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [key.name for key in KeyFile.read(path).keys] == list(keys)
        for key in keys.values():
            assert key.startswith("coprs_")
            assert len(key) == len("coprs_") + 43  # 256 bits
            assert key.removeprefix("coprs_") not in path.read_text()
        found = ApiKeys(path=path)
        assert [found.find(key).name for key in keys.values()] == list(keys)

    @pytest.mark.parametrize("given", ["", "coprs_", "alice", "\xe9", "x" * 10_000, "\udcff"])
    def test_other_keys_are_not_found(self, tmp_path, given):
        path = tmp_path / "keys.json"
        key = new_key(path, "alice")
        keys = ApiKeys(path=path)
        assert keys.find(given) is keys.find(key + "x") is keys.find(key[:-1]) is None
        assert keys.find(KeyFile.read(path).keys[0].sha256) is None  # the hash is no key

    def test_every_hash_is_compared(self, tmp_path, monkeypatch):
        path = tmp_path / "keys.json"
        key = new_key(path, "alice")
        for name in "bc":
            new_key(path, name)
        compared = []

        def compare(one, other):
            compared.append(other)
            return original(one, other)

        original = api_keys.hmac.compare_digest
        monkeypatch.setattr(api_keys.hmac, "compare_digest", compare)
        assert ApiKeys(path=path).find(key).name == "alice"
        assert len(compared) == 3

    def test_removed_key_is_revoked_without_a_restart(self, tmp_path, caplog):
        path = tmp_path / "keys.json"
        alice, bob = new_key(path, "alice"), new_key(path, "bob")
        keys = ApiKeys(path=path)
        content = json.loads(path.read_text())
        content["keys"] = content["keys"][1:]
        path.write_text(json.dumps(content))
        assert keys.find(alice) is None
        assert keys.find(bob).name == "bob"
        path.write_text("{")
        assert keys.find(bob).name == "bob"  # a file in the middle of an edit
        assert "the API keys were not read again" in caplog.text

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ("{", "is no file of API keys"),
            ('{"keys": [{"name": "a", "sha256": "00"}]}', "is no file of API keys"),
            ('{"keys": [{"name": "a b", "sha256": "%s"}]}' % ("0" * 64), "no file of API keys"),
            (
                '{"keys": [{"name": "a", "sha256": "%s", "max_concurrent": 0}]}' % ("0" * 64),
                "no file of API keys",
            ),
            (
                json.dumps({"keys": [{"name": "a", "sha256": "0" * 64}] * 2}),
                "two keys named a",
            ),
        ],
    )
    def test_file_that_is_not_accepted_is_refused(self, tmp_path, content, part):
        path = tmp_path / "keys.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=part):
            ApiKeys(path=path)

    @pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\nb", "é"])
    def test_name_that_is_not_accepted_is_refused(self, tmp_path, name):
        with pytest.raises(ValueError, match="accepted: a name of 1 to 64"):
            new_key(tmp_path / "keys.json", name)

    def test_name_that_is_taken_is_refused(self, tmp_path):
        path = tmp_path / "keys.json"
        new_key(path, "alice")
        with pytest.raises(ValueError, match="has a key named alice"):
            new_key(path, "alice")


class TestLimits:
    def test_requests_of_any_minute_are_limited(self):
        now = 0.0
        keys = ApiKeys("secret", requests_per_minute=2, clock=lambda: now)
        key = keys.find("secret")

        def ask():
            with keys.admit(key):
                pass

        ask()
        now = 50.0
        ask()
        with pytest.raises(KeyLimitError, match="2 requests in the last minute") as caught:
            ask()
        assert caught.value.retry_after_s == 10
        now = 60.0
        ask()  # the first one is a minute ago; refused ones do not count
        with pytest.raises(KeyLimitError):
            ask()

    def test_limits_of_a_key_go_before_those_of_the_server(self, tmp_path):
        path = tmp_path / "keys.json"
        few, many = new_key(path, "few"), new_key(path, "many")
        content = json.loads(path.read_text())
        content["keys"][1]["max_concurrent"] = 2
        path.write_text(json.dumps(content))
        keys = ApiKeys(path=path, max_concurrent=1)
        for given, most in ((few, 1), (many, 2)):
            key = keys.find(given)
            held = [keys.admit(key) for _ in range(most)]
            for each in held:
                each.__enter__()
            with pytest.raises(KeyLimitError, match=f"{most} active requests"), keys.admit(key):
                pass
            held[0].__exit__(None, None, None)
            with keys.admit(key):
                pass

    def test_request_above_the_limit_gets_429(self, build):
        keys = ApiKeys("secret", requests_per_minute=1)
        client, policy = connect_to(build, app_options={"api_keys": keys})
        assert post(client).status_code == 401  # does not count
        assert post(client, headers=bearer("secret")).status_code == 200
        response = post(client, headers=bearer("secret"))
        assert (response.status_code, response.json()["type"]) == (429, "TooManyRequests")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert len(policy.requests) == 1
        assert client.get("/health").status_code == 200

    def test_active_requests_are_limited_until_they_end(self, build):
        begun, release = threading.Event(), threading.Event()
        policy = FakePolicy(during=lambda: (begun.set(), release.wait(WAIT)))
        keys = ApiKeys("secret", max_concurrent=1)
        client, _ = connect_to(build, policy, {"api_keys": keys})
        first = threading.Thread(target=post, args=(client, None, bearer("secret")))
        first.start()
        assert begun.wait(WAIT)
        refused = post(client, headers=bearer("secret"))
        release.set()
        first.join()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert post(client, headers=bearer("secret")).status_code == 200

    def test_document_of_a_server_with_keys_has_the_statuses(self, build):
        client, _ = connect_to(build, app_options={"api_keys": ApiKeys("secret")})
        responses = client.get("/openapi.json").json()["paths"]["/segment"]["post"]["responses"]
        assert "Retry-After" in responses["429"]["headers"]
        assert "WWW-Authenticate" in responses["401"]["headers"]
