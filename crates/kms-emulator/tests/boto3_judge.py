"""Drives the emulator with boto3 and holds every answer against AWS's own model of KMS.

Usage: python boto3_judge.py URL
"""

import json
import re
import sys
import urllib.request

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

URL = sys.argv[1]
HOME, AWAY = "eu-west-1", "eu-central-1"
OURS, THEIRS = "111122223333", "444455556666"
judged = 0
# What has been judged: operations that succeeded, and errors.
served, failed = set(), set()
OPERATIONS = {
    "CreateKey", "DescribeKey", "ListKeys", "CreateAlias", "UpdateAlias", "DeleteAlias", "ListAliases",
    "GenerateDataKey", "GenerateDataKeyWithoutPlaintext", "Encrypt", "Decrypt", "ReEncrypt", "EnableKey",
    "DisableKey", "ScheduleKeyDeletion", "CancelKeyDeletion", "EnableKeyRotation", "DisableKeyRotation",
    "RotateKeyOnDemand", "ListKeyRotations", "GetKeyRotationStatus", "ReplicateKey", "GetKeyPolicy",
    "PutKeyPolicy", "ListKeyPolicies", "ListResourceTags",
}
ERRORS = {
    "DisabledException", "KMSInvalidStateException", "IncorrectKeyException", "InvalidCiphertextException",
    "NotFoundException", "AccessDeniedException", "ThrottlingException", "KMSInternalException",
    "DependencyTimeoutException", "KeyUnavailableException", "InvalidKeyUsageException", "ValidationException",
}


def client(service="kms", region=HOME, key="AKIAEXAMPLE", token=None):
    made = boto3.client(
        service,
        endpoint_url=URL,
        region_name=region,
        aws_access_key_id=key,
        aws_secret_access_key="secret",
        aws_session_token=token,
        config=Config(retries={"total_max_attempts": 1}),
    )
    if service == "kms":
        made.meta.events.register("after-call.kms", judge)
    return made


def judge(model, http_response, **_):
    """The raw body has what the model has and nothing else: boto3 itself would skip what it does not know."""
    global judged
    judged += 1
    headers = http_response.headers
    assert headers["content-type"] == "application/x-amz-json-1.1", headers
    assert headers["x-amzn-requestid"], headers
    body = json.loads(http_response.content) if http_response.content else None
    if http_response.status_code == 200:
        served.add(model.name)
        if model.output_shape is None:
            assert body is None, (model.name, body)
        else:
            conforms(body, model.output_shape, model.name)
        return
    code = body["__type"]
    failed.add(code)
    assert headers["x-amzn-errortype"] == code, (headers, body)
    assert set(body) <= {"__type", "message"}, body
    server_faults = {"KMSInternalException", "DependencyTimeoutException", "KeyUnavailableException"}
    assert http_response.status_code == (500 if code in server_faults else 400), (code, http_response.status_code)
    anywhere = {"AccessDeniedException", "ThrottlingException", "ValidationException"}
    anywhere |= {"UnrecognizedClientException", "InvalidArnException"}
    assert code in anywhere | {shape.name for shape in model.error_shapes}, (model.name, code)


def conforms(value, shape, path):
    kind = shape.type_name
    if kind == "structure":
        assert isinstance(value, dict), path
        unknown = set(value) - set(shape.members)
        assert not unknown, f"{path}: unknown {unknown}"
        missing = set(shape.required_members) - set(value)
        assert not missing, f"{path}: missing {missing}"
        for name, part in value.items():
            conforms(part, shape.members[name], f"{path}.{name}")
    elif kind == "list":
        assert isinstance(value, list), path
        for part in value:
            conforms(part, shape.member, f"{path}[]")
    elif kind == "boolean":
        assert isinstance(value, bool), path
    elif kind == "integer":
        assert isinstance(value, int) and not isinstance(value, bool), path
        in_range(value, shape, path)
    elif kind == "timestamp":
        assert isinstance(value, (int, float)) and 1.5e9 < value < 1e10, f"{path}: {value}"
    elif kind in ("string", "blob"):
        assert isinstance(value, str), path
        if kind == "string":
            in_range(len(value), shape, path)
            enum, pattern = shape.metadata.get("enum"), shape.metadata.get("pattern")
            assert not enum or value in enum, f"{path}: {value}"
            assert not pattern or re.search(pattern, value), f"{path}: {value}"
    else:
        raise AssertionError(f"{path}: {kind}")


def in_range(number, shape, path):
    limits = shape.metadata
    assert limits.get("min", number) <= number <= limits.get("max", number), f"{path}: {number}"


def refused(code, call, **parameters):
    try:
        call(**parameters)
    except ClientError as error:
        assert error.response["Error"]["Code"] == code, error
        return error.response["Error"]["Message"]
    raise AssertionError(f"{call.__name__} should be refused with {code}")


def keys_and_data(kms):
    made = kms.create_key(Description="judged", Tags=[{"TagKey": "a", "TagValue": "b"}])["KeyMetadata"]
    arn = made["Arn"]
    assert made["KeyState"] == "Enabled" and made["AWSAccountId"] == OURS, made
    assert kms.list_resource_tags(KeyId=arn)["Tags"] == [{"TagKey": "a", "TagValue": "b"}]
    context = {"keyfold:tenant": "acme", "b": "c"}
    data = kms.generate_data_key(KeyId=arn, KeySpec="AES_256", EncryptionContext=context)
    assert len(data["CiphertextBlob"]) == 184 and len(data["Plaintext"]) == 32 and data["KeyId"] == arn
    opened = kms.decrypt(CiphertextBlob=data["CiphertextBlob"], KeyId=arn, EncryptionContext=context)
    assert opened["Plaintext"] == data["Plaintext"] and opened["KeyId"] == arn
    assert opened["KeyMaterialId"] == data["KeyMaterialId"] == made["CurrentKeyMaterialId"]
    for wrong in ({}, {"keyfold:tenant": "acme"}, {"keyfold:tenant": "acme", "b": "d"}):
        blob = data["CiphertextBlob"]
        refused("InvalidCiphertextException", kms.decrypt, CiphertextBlob=blob, EncryptionContext=wrong)
    tampered = bytearray(data["CiphertextBlob"])
    tampered[100] ^= 1
    refused("InvalidCiphertextException", kms.decrypt, CiphertextBlob=bytes(tampered), EncryptionContext=context)
    alone = kms.generate_data_key_without_plaintext(KeyId=arn, NumberOfBytes=24)
    assert len(kms.decrypt(CiphertextBlob=alone["CiphertextBlob"])["Plaintext"]) == 24
    sealed = kms.encrypt(KeyId=arn, Plaintext=data["Plaintext"])
    assert len(sealed["CiphertextBlob"]) == 167
    other = kms.create_key()["KeyMetadata"]["KeyId"]
    refused("IncorrectKeyException", kms.decrypt, CiphertextBlob=sealed["CiphertextBlob"], KeyId=other)
    moved = kms.re_encrypt(
        CiphertextBlob=sealed["CiphertextBlob"],
        SourceKeyId=arn,
        DestinationKeyId=other,
        DestinationEncryptionContext=context,
    )
    assert moved["SourceKeyId"] == arn and moved["KeyId"].endswith(other)
    assert kms.decrypt(CiphertextBlob=moved["CiphertextBlob"], EncryptionContext=context)["Plaintext"] == data["Plaintext"]
    refused("ValidationException", kms.generate_data_key, KeyId=arn)
    signing = kms.create_key(KeyUsage="SIGN_VERIFY", KeySpec="ECC_NIST_P256")["KeyMetadata"]["KeyId"]
    refused("InvalidKeyUsageException", kms.encrypt, KeyId=signing, Plaintext=b"x")
    return arn, other


def names(kms, arn, other):
    kms.create_alias(AliasName="alias/judged", TargetKeyId=arn)
    message = refused("AlreadyExistsException", kms.create_alias, AliasName="alias/judged", TargetKeyId=other)
    assert "already exists" in message
    assert kms.describe_key(KeyId="alias/judged")["KeyMetadata"]["Arn"] == arn
    kms.update_alias(AliasName="alias/judged", TargetKeyId=other)
    pages = kms.get_paginator("list_aliases").paginate(PaginationConfig={"PageSize": 1})
    assert [alias["AliasName"] for page in pages for alias in page["Aliases"]] == ["alias/judged"]
    kms.delete_alias(AliasName="alias/judged")
    message = refused("NotFoundException", kms.describe_key, KeyId="alias/judged")
    assert message == f"Alias arn:aws:kms:{HOME}:{OURS}:alias/judged is not found.", message
    pages = kms.get_paginator("list_keys").paginate(PaginationConfig={"PageSize": 2})
    assert arn in [key["KeyArn"] for page in pages for key in page["Keys"]]
    refused("InvalidArnException", kms.describe_key, KeyId="arn:aws:kms:x")
    message = refused("NotFoundException", client(region=AWAY).describe_key, KeyId=arn)
    assert message == f"Invalid arn {HOME}", message


def states(kms, arn):
    data = kms.generate_data_key(KeyId=arn, KeySpec="AES_128")
    kms.disable_key(KeyId=arn)
    message = refused("DisabledException", kms.decrypt, CiphertextBlob=data["CiphertextBlob"])
    assert message == f"{arn} is disabled.", message
    kms.enable_key(KeyId=arn)
    gone = kms.schedule_key_deletion(KeyId=arn, PendingWindowInDays=7)
    assert gone["KeyState"] == "PendingDeletion" and gone["KeyId"] == arn
    message = refused("KMSInvalidStateException", kms.decrypt, CiphertextBlob=data["CiphertextBlob"])
    assert message == f"{arn} is pending deletion.", message
    assert "DeletionDate" in kms.describe_key(KeyId=arn)["KeyMetadata"]
    kms.cancel_key_deletion(KeyId=arn)
    assert kms.describe_key(KeyId=arn)["KeyMetadata"]["KeyState"] == "Disabled"
    kms.enable_key(KeyId=arn)
    assert kms.decrypt(CiphertextBlob=data["CiphertextBlob"])["Plaintext"] == data["Plaintext"]


def rotation(kms, arn):
    before = kms.generate_data_key(KeyId=arn, KeySpec="AES_256")
    kms.enable_key_rotation(KeyId=arn, RotationPeriodInDays=180)
    status = kms.get_key_rotation_status(KeyId=arn)
    assert status["KeyRotationEnabled"] and status["RotationPeriodInDays"] == 180, status
    kms.rotate_key_on_demand(KeyId=arn)
    after = kms.generate_data_key(KeyId=arn, KeySpec="AES_256")
    assert before["KeyMaterialId"] != after["KeyMaterialId"]
    opened = kms.decrypt(CiphertextBlob=before["CiphertextBlob"], KeyId=arn)
    assert opened["Plaintext"] == before["Plaintext"] and opened["KeyMaterialId"] == before["KeyMaterialId"]
    pages = kms.get_paginator("list_key_rotations").paginate(
        KeyId=arn, IncludeKeyMaterial="ALL_KEY_MATERIAL", PaginationConfig={"PageSize": 1}
    )
    states = [rotation["KeyMaterialState"] for page in pages for rotation in page["Rotations"]]
    assert states == ["NON_CURRENT", "CURRENT"], states
    kms.disable_key_rotation(KeyId=arn)
    assert not kms.get_key_rotation_status(KeyId=arn)["KeyRotationEnabled"]


def regions(kms):
    away = client(region=AWAY)
    primary = kms.create_key(MultiRegion=True)["KeyMetadata"]
    assert primary["KeyId"].startswith("mrk-")
    replica = kms.replicate_key(KeyId=primary["Arn"], ReplicaRegion=AWAY)["ReplicaKeyMetadata"]
    assert replica["KeyId"] == primary["KeyId"] and replica["Arn"] != primary["Arn"]
    assert replica["MultiRegionConfiguration"]["MultiRegionKeyType"] == "REPLICA"
    data = kms.generate_data_key(KeyId=primary["KeyId"], KeySpec="AES_256")
    opened = away.decrypt(CiphertextBlob=data["CiphertextBlob"], KeyId=replica["Arn"])
    assert opened["Plaintext"] == data["Plaintext"] and opened["KeyId"] == replica["Arn"]
    refused("AlreadyExistsException", kms.replicate_key, KeyId=primary["Arn"], ReplicaRegion=AWAY)
    kms.schedule_key_deletion(KeyId=primary["Arn"], PendingWindowInDays=7)
    state = kms.describe_key(KeyId=primary["Arn"])["KeyMetadata"]
    assert state["KeyState"] == "PendingReplicaDeletion" and state["PendingDeletionWindowInDays"] == 7


def permissions(kms, arn):
    mallory = client(key="AKIAMALLORY")
    mallory.describe_key(KeyId=arn)
    policy = json.loads(kms.get_key_policy(KeyId=arn)["Policy"])
    policy["Statement"].append(
        {
            "Effect": "Deny",
            "Principal": {"AWS": f"arn:aws:iam::{OURS}:user/mallory"},
            "Action": "kms:GenerateDataKey",
            "Resource": "*",
            "Condition": {"StringNotEquals": {"kms:EncryptionContext:keyfold:tenant": "acme"}},
        }
    )
    kms.put_key_policy(KeyId=arn, Policy=json.dumps(policy))
    assert kms.list_key_policies(KeyId=arn)["PolicyNames"] == ["default"]
    mallory.generate_data_key(KeyId=arn, KeySpec="AES_256", EncryptionContext={"keyfold:tenant": "acme"})
    message = refused("AccessDeniedException", mallory.generate_data_key, KeyId=arn, KeySpec="AES_256")
    who, what = f"User: arn:aws:iam::{OURS}:user/mallory", f"kms:GenerateDataKey on resource: {arn}"
    assert message.startswith(f"{who} is not authorized to perform: {what}"), message
    refused("AccessDeniedException", client(key=THEIRS).describe_key, KeyId=arn)
    refused("MalformedPolicyDocumentException", kms.put_key_policy, KeyId=arn, Policy='{"Statement": []}')


def roles():
    sts = client("sts")
    role = {"RoleArn": f"arn:aws:iam::{THEIRS}:role/keyfold", "RoleSessionName": "judge"}
    message = refused("AccessDenied", sts.assume_role, **role)
    assert "is not authorized to perform: sts:AssumeRole" in message, message
    credentials = sts.assume_role(ExternalId="tenant-7", **role)["Credentials"]
    token = credentials["SessionToken"]
    assumed = client("sts", key=credentials["AccessKeyId"], token=token)
    identity = assumed.get_caller_identity()
    assert identity["Account"] == THEIRS, identity
    assert identity["Arn"] == f"arn:aws:sts::{THEIRS}:assumed-role/keyfold/judge", identity
    theirs = client(key=credentials["AccessKeyId"], token=token)
    assert theirs.create_key()["KeyMetadata"]["AWSAccountId"] == THEIRS
    refused("UnrecognizedClientException", client(key=credentials["AccessKeyId"], token="x").list_keys)


def control(method, path, body=None):
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(URL + "/_emulator" + path, data, {"content-type": "application/json"}, method=method)
    urllib.request.urlopen(request).read()


def faults(kms, arn):
    kinds = {
        "internal": "KMSInternalException",
        "dependency_timeout": "DependencyTimeoutException",
        "key_unavailable": "KeyUnavailableException",
        "deny": "AccessDeniedException",
    }
    told = [({"kind": kind}, code) for kind, code in kinds.items()]
    told.append(({"kind": "throttle", "per_second": 0}, "ThrottlingException"))
    for fault, code in told:
        control("POST", "/faults", {"region": HOME, "operation": "GenerateDataKey", "fault": fault})
        refused(code, kms.generate_data_key, KeyId=arn, KeySpec="AES_256")
        kms.describe_key(KeyId=arn)
        control("DELETE", "/faults")
    kms.generate_data_key(KeyId=arn, KeySpec="AES_256")


def main():
    kms = client()
    arn, other = keys_and_data(kms)
    names(kms, arn, other)
    states(kms, arn)
    rotation(kms, arn)
    regions(kms)
    permissions(kms, arn)
    roles()
    faults(kms, arn)
    assert not OPERATIONS - served, f"not judged: {OPERATIONS - served}"
    assert not ERRORS - failed, f"not judged: {ERRORS - failed}"
    print(f"{judged} answers are as AWS describes them")


main()
