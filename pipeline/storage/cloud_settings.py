"""Settings of az and gs that obstore does not read from the environment: connection strings, endpoints, emulators."""

import os
from typing import Any

from pipeline.errors import SettingRefused

AZURE_NAME, AZURE_CONNECTION = "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING"
AZURE_ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
EMULATOR_HOST = "STORAGE_EMULATOR_HOST"

EMULATOR_ACCOUNT = "devstoreaccount1"
EMULATOR_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's account and key, which are public: https://learn.microsoft.com/azure/storage/common/storage-connect-azurite"""

HINTS = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "az": f"check {AZURE_NAME} with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or {AZURE_CONNECTION}",
    "gs": f"check GOOGLE_APPLICATION_CREDENTIALS, or {EMULATOR_HOST} for an emulator",
}
"""What to check if a bucket cannot be opened, by kind."""


def kind_of(root: str) -> str:
    """`s3`, `gs` or `az`, from the URI of a bucket."""
    scheme = root.partition("://")[0]
    return "s3" if scheme.startswith("s3") else "gs" if scheme in ("gs", "gcs") else "az"


def azure_config() -> dict[str, Any]:
    """Configuration of obstore from a connection string; empty if the environment names an account."""
    text = os.environ.get(AZURE_CONNECTION, "")
    if not text or os.environ.get(AZURE_NAME) or os.environ.get("AZURE_STORAGE_USE_EMULATOR"):
        return {}
    parts = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    if parts.get("UseDevelopmentStorage", "").lower() == "true":
        return {"use_emulator": True}
    name = parts.get("AccountName", "")
    suffix = parts.get("EndpointSuffix", "core.windows.net")
    endpoint = parts.get("BlobEndpoint") or f"{parts.get('DefaultEndpointsProtocol', 'https')}://{name}.blob.{suffix}"
    # The host of a BlobEndpoint names the account if the string does not, as in those with a signature.
    name = name or endpoint.partition("://")[2].partition(".")[0]
    config = {"account_name": name, "endpoint": endpoint}
    if "AccountKey" in parts:
        config["account_key"] = parts["AccountKey"]
    elif "SharedAccessSignature" in parts:
        config["sas_key"] = parts["SharedAccessSignature"].lstrip("?")
    else:
        raise SettingRefused(f"{AZURE_CONNECTION} has neither AccountKey nor SharedAccessSignature: copy it again")
    return config


def azure_sdk_config() -> dict[str, Any]:
    """`account_url` and `credential` of Azure's SDK from the settings that obstore uses. Raises SettingRefused."""
    config = azure_config()
    name = config.get("account_name") or os.environ.get(AZURE_NAME, "")
    key = config.get("account_key") or os.environ.get("AZURE_STORAGE_ACCOUNT_KEY")
    if config.get("use_emulator") or os.environ.get("AZURE_STORAGE_USE_EMULATOR"):
        name, key = EMULATOR_ACCOUNT, EMULATOR_KEY
        url = f"{os.environ.get('AZURITE_BLOB_STORAGE_URL', 'http://127.0.0.1:10000')}/{name}"
    else:
        url = endpoint_of("az", config) or f"https://{name}.blob.core.windows.net"
    signature = config.get("sas_key") or os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    if not (key or signature):
        raise SettingRefused(f"neither an account key nor a SAS token is set; {HINTS['az']}")
    return {"account_url": url, "credential": {"account_name": name, "account_key": key} if key else signature}


def gcs_config() -> dict[str, Any]:
    """Configuration of obstore for the emulator of STORAGE_EMULATOR_HOST; empty if that is not set."""
    host = os.environ.get(EMULATOR_HOST, "")
    if not host:
        return {}
    return {"base_url": host.rstrip("/") if "://" in host else f"http://{host}", "bearer_token": "emulator"}


def endpoint_of(kind: str, config: dict[str, Any]) -> str:
    """The endpoint that the settings name, "" for that of the cloud. Raises SettingRefused if it is no URL."""
    given = config.get("endpoint") or config.get("base_url") or ""
    if kind == "az" and not given:
        given = next((os.environ[name] for name in AZURE_ENDPOINTS if os.environ.get(name)), "")
    if given and not given.startswith(("http://", "https://")):
        raise SettingRefused(f"the endpoint {given} must begin with http:// or https://; {HINTS[kind]}")
    return str(given)
