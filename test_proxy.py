#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The tests of claude_gemini_proxy, and the Gemini they run against. Standard library only, no network, no key.

    python3 test_proxy.py                 everything; -v and -k PATTERN as in unittest
    python3 test_proxy.py bench           what the proxy adds to a request, in numbers
    SEED=7 CASES=20000 python3 test_proxy.py Fuzz      repeat or prolong the fuzzing

To add a case, add a row to REQUEST_CASES, SCHEMA_CASES, RESPONSE_CASES or ERROR_CASES. FakeGemini refuses what the
real API refuses, in its words; a refusal that starts with "Our rule" is about something that Google takes, or is
not known to refuse, and that the proxy promises not to send. A reply of its script is one of

    {...}                      one response object; with "error" in it, that error under its own status
    [chunk, 0.5, chunk, ...]   what a stream sends: dict = chunk, number = seconds of silence, bytes = as they
                               are, "cut" = early end, "reset" = TCP reset, "hang" = silence for good;
                               generateContent sends the same chunks merged into one
    (status, headers, body)    anything else, e.g. plain JSON at the stream endpoint
"""
import ast
import base64
import contextlib
import copy
import dataclasses
import functools
import http.client
import importlib.util
import io
import itertools
import json
import logging
import os
import platform
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import unittest
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
import claude_gemini_proxy as proxy  # noqa: E402

SEED = int(os.environ.get("SEED", "0"))
CASES = int(os.environ.get("CASES", "1000"))

# ---- 1. The form of a request ------------------------------------------------------------------------------
# Message and fields; "*" a list, "{}" a map; kinds: a message, an enum A|B, str num int bool bytes, obj (any
# object), json (anything). Source: generativelanguage v1beta, revision 20260413, and recorded requests.
FIELDS = """
GenerateContentRequest model:str contents*:Content systemInstruction:Content tools*:Tool toolConfig:ToolConfig
 safetySettings*:SafetySetting generationConfig:GenerationConfig cachedContent:str store:bool labels:obj
 continuationToken:bytes serviceTier:STANDARD|FLEX|PRIORITY
CountTokensRequest contents*:Content generateContentRequest:GenerateContentRequest
Content role:str parts*:Part
Part text:str inlineData:Blob fileData:FileData functionCall:FunctionCall functionResponse:FunctionResponse
 executableCode:obj codeExecutionResult:obj toolCall:obj toolResponse:obj thought:bool thoughtSignature:bytes
 videoMetadata:obj partMetadata:obj mediaResolution:obj
Blob mimeType:str data:bytes
FileData mimeType:str fileUri:str
FunctionCall id:str name:str args:obj
FunctionResponse id:str name:str response:obj parts*:FunctionResponsePart scheduling:str willContinue:bool
FunctionResponsePart inlineData:FunctionResponseBlob fileData:FileData
FunctionResponseBlob mimeType:str data:bytes displayName:str
Tool functionDeclarations*:FunctionDeclaration googleSearch:GoogleSearch urlContext:UrlContext googleMaps:obj
 codeExecution:CodeExecution googleSearchRetrieval:obj computerUse:obj fileSearch:obj mcpServers*:obj
GoogleSearch timeRangeFilter:obj searchTypes:obj
UrlContext
CodeExecution
FunctionDeclaration name:str description:str parameters:Schema parametersJsonSchema:json response:Schema
 responseJsonSchema:json behavior:BLOCKING|NON_BLOCKING
ToolConfig functionCallingConfig:FunctionCallingConfig includeServerSideToolInvocations:bool retrievalConfig:obj
FunctionCallingConfig mode:AUTO|ANY|NONE|VALIDATED allowedFunctionNames*:str
SafetySetting category:json threshold:json
GenerationConfig temperature:num topP:num topK:int candidateCount:int maxOutputTokens:int stopSequences*:str
 presencePenalty:num frequencyPenalty:num seed:int responseLogprobs:bool logprobs:int responseMimeType:str
 responseSchema:Schema responseJsonSchema:json responseFormat:json responseModalities*:str speechConfig:obj
 mediaResolution:str thinkingConfig:ThinkingConfig imageConfig:obj enableEnhancedCivicAnswers:bool
ThinkingConfig includeThoughts:bool thinkingBudget:int thinkingLevel:MINIMAL|LOW|MEDIUM|HIGH|XHIGH
Schema type:STRING|NUMBER|INTEGER|BOOLEAN|ARRAY|OBJECT|NULL title:str description:str nullable:bool format:str
 enum*:str default:json example:json items:Schema maxItems:int minItems:int properties{}:Schema required*:str
 propertyOrdering*:str minProperties:int maxProperties:int minimum:num maximum:num minLength:int maxLength:int
 pattern:str anyOf*:Schema
""".replace("\n ", " ").strip()
FIELDS = {line.split()[0]: dict(f.split(":") for f in line.split()[1:]) for line in FIELDS.split("\n")}
PART_DATA = ("text inlineData fileData functionCall functionResponse executableCode codeExecutionResult toolCall"
             " toolResponse").split()
SCALARS = {"str": str, "num": (int, float), "int": (int, float, str), "bool": bool, "obj": dict, "bytes": str,
           "json": object}


class Refused(Exception):
    """The request is broken; the text is what Google says with its 400."""


def need(ok, text, *args):
    if not ok:
        raise Refused(re.sub(r"^\* ", "* GenerateContentRequest.", text % args))


def snake(name):
    return re.sub("[A-Z]", lambda m: "_" + m.group().lower(), name)


def shaped(value, kind, path="", name=""):
    """Read `value` as proto3 JSON does: a copy with camelCase names and capital enums, or Refused."""
    where = (path + "." if path else "") + snake(name)
    need(kind == "json" or not isinstance(value, list), "Invalid JSON payload received. Unknown name \"%s\" at '%s':"
         " Proto field is not repeating, cannot start list.", snake(name), path)
    if kind in FIELDS and isinstance(value, dict):
        return {k: v for key in value for k, v in shaped_field(key, value[key], FIELDS[kind], where)}
    ok = isinstance(value, SCALARS.get(kind, ())) and (kind not in ("num", "int") or not isinstance(value, bool))
    if kind == "int":
        ok = ok and re.match(r"-?\d{1,19}(\.0+)?$", str(value))
        value = int(float(value)) if ok else value
    elif kind == "bytes":  # Google's parser takes both alphabets, padded or not
        ok = ok and re.match("[A-Za-z0-9+/_-]*={0,2}$", value) and len(value.rstrip("=")) % 4 != 1
        need(ok, "Invalid value at '%s' (TYPE_BYTES), Base64 decoding failed for \"%.60s\"", where, value)
    elif kind.isupper():
        value = str(value).upper()
        ok = value in kind.split("|")
    need(ok, "Invalid value at '%s' (%s), %.60s", where, kind, json.dumps(value))
    return value


def shaped_field(key, value, fields, where):
    """-> one pair, or nothing for null."""
    name = re.sub("_([a-z0-9])", lambda m: m.group(1).upper(), key)
    field = next((f for f in (name, name + "*", name + "{}") if f in fields), "")
    need(field, "Invalid JSON payload received. Unknown name \"%s\" at '%s': Cannot find field.", key, where)
    many = field[-1] in "*}" and value is not None
    if many and field[-1] == "}":
        need(isinstance(value, dict), "Invalid value at '%s.%s' (map)", where, snake(name))
        value = {k: shaped(x, fields[field], where, "%s[%d].value" % (name, i)) for i, (k, x) in enumerate(value.items())}
    elif many:
        value = value if isinstance(value, list) else [value]
        need(None not in value, "Invalid value at '%s.%s': null in a list", where, snake(name))
        value = [shaped(x, fields[field], where, "%s[%d]" % (name, i)) for i, x in enumerate(value)]
    if value is not None:
        yield name, value if many else shaped(value, fields[field], where, name)


# ---- 2. Its meaning ----------------------------------------------------------------------------------------
DUMMIES = {"skip_thought_signature_validator", "context_engineering_is_the_way_to_go"}
DUMMIES |= {base64.b64encode(d.encode()).decode() for d in DUMMIES}  # the form SDKs send
ALIASES = {"gemini-flash-latest": "gemini-3.8-flash", "gemini-flash-lite-latest": "gemini-3.5-flash-lite",
           "gemini-pro-latest": "gemini-3.1-pro-preview"}
MODELS = ("gemini-4-argon gemini-3.8-flash gemini-3.7-flash gemini-3.6-flash gemini-3.5-flash gemini-3.5-flash-lite"
          " gemini-3.1-flash-lite gemini-3.1-pro-preview gemini-3-flash-preview gemini-2.5-pro gemini-2.5-flash"
          " gemini-2.5-flash-lite").split() + list(ALIASES)
NO_MINIMAL = r"gemini-(4|3\.[78]|3\.1-pro)"
BUDGETS = {"gemini-2.5-pro": (128, 32768), "gemini-2.5-flash": (1, 24576), "gemini-2.5-flash-lite": (512, 24576)}
INLINE = r"image/(png|jpeg|webp|heic|heif)$|application/(pdf|json)$|text/.|audio/.|video/."
IN_RESPONSE = r"(image/(png|jpeg|webp)|application/pdf|text/plain)$"
NAME = r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}$"
JSON_SCHEMA = set("type properties required items enum anyOf description title format minimum maximum minItems maxItems"
                  " minLength maxLength minProperties maxProperties pattern default additionalProperties nullable".split())
FORMATS = "date-time date time enum int32 int64 float double".split()
BAD_NAME = ("* %s.name: Invalid function name. Must start with a letter or an underscore. Must be alphanumeric (a-z,"
            " A-Z, 0-9), underscores (_), dots (.), colons (:), or dashes (-), with a maximum length of 64.")
MISSING = ("Function call is missing a thought_signature in functionCall parts. This is required for tools to work"
           " correctly, and missing thought_signature may lead to degraded model performance. Additional data, function"
           " call `default_api:%s` , position %d. Please refer to"
           " https://ai.google.dev/gemini-api/docs/thought-signatures for more details.")
COUNT = ("Please ensure that the number of function response parts is equal to the number of function call parts of"
         " the function call turn.")
CALL_ORDER = ("Please ensure that function call turn comes immediately after a user turn or after a function response"
              " turn.")
RESPONSE_ORDER = "Please ensure that function response turn comes immediately after a function call turn."


def refusal(body, model, issued=None, strict=True):
    """-> None, or Google's message. `issued`: thought signature -> (name, args) of its call, None for a text's."""
    try:
        Check(model, issued, strict).request(shaped(body, "GenerateContentRequest"))
    except Refused as e:
        return str(e)
    return None


def count_refusal(body):
    """countTokens looks at the form only."""
    try:
        inner = shaped(body, "CountTokensRequest").get("generateContentRequest", {"model": "models/"})
        need(inner.get("model", "").startswith("models/"), "* model: unexpected model name format")
    except Refused as e:
        return str(e)
    return None


def same_call(call, name, args):
    """The proxy may leave out nulls and "", and write 5 for "5"; Claude Code 2.1.329 writes é for \\u00e9."""
    plain = [{k: str(v).lower() for k, v in (x or {}).items() if v not in (None, "")} for x in (call.get("args"), args)]
    plain = [re.sub(r"\\+u([0-9a-f]{4})", lambda m: chr(int(m.group(1), 16)), str(sorted(x.items()))) for x in plain]
    return call.get("name") == name and plain[0] == plain[1]


class Check:
    """Raises Refused for the first thing that is wrong."""

    def __init__(self, model, issued, strict):
        self.model, self.issued, self.strict = ALIASES.get(model, model), issued, strict
        self.version = [int(n) for n in re.findall(r"\d+", self.model)[:2]]
        self.new = self.version >= [3]

    def our_rule(self, ok, text, *args):
        need(ok or not self.strict, "Our rule: " + text, *args)

    def request(self, r):
        contents, tools = r.get("contents") or [], r.get("tools", [])
        need(contents, "* contents: contents is not specified")
        for p in r.get("systemInstruction", {}).get("parts", []):
            need("text" in p, "* system_instruction: only text parts are supported")
            self.our_rule(p["text"], "empty text in systemInstruction")
        for i, c in enumerate(contents):
            need(c.get("role", "user") in ("user", "model"), "Please use a valid role: user, model.")
            need(c.get("parts"), "* contents[%d].parts: contents.parts must not be empty.", i)
            for j, p in enumerate(c["parts"]):
                self.part(p, c.get("role"), "contents[%d].parts[%d]" % (i, j))
        self.order(contents)
        self.signatures(contents)
        self.our_rule("tools" not in r or tools, "empty tools")
        names = [name for i, t in enumerate(tools) for name in self.tool(t, "tools[%d]" % i)]
        need(len(names) == len(set(names)), "Duplicate function declaration found in %s", names)
        self.tool_config(r.get("toolConfig", {}), names, any(set(t) - {"functionDeclarations"} for t in tools))
        self.generation(r.get("generationConfig", {}), names)

    def part(self, p, role, where):
        data = [k for k in PART_DATA if k in p]
        need(data, "* %s.data: required oneof field 'data' must have one initialized field", where)
        need(len(data) == 1, "Invalid value at '%s' (oneof), oneof field 'data' is already set: %s", where, data)
        self.our_rule(p.get("text") != "" or "thoughtSignature" in p, "empty text at %s", where)
        self.our_rule(role == "model" or not p.get("thought") and "thoughtSignature" not in p, "a user's thought, %s", where)
        kind, value = data[0], p[data[0]]
        if kind in ("functionCall", "functionResponse"):
            need(value.get("name"), "* %s.%s.name: Name cannot be empty.", where, snake(kind))
            need(re.match(NAME, value["name"]), BAD_NAME, where + "." + snake(kind))
            self.our_rule((role == "model") == (kind == "functionCall"), "%s in the wrong role at %s", kind, where)
            need(kind == "functionCall" or "response" in value, "* %s.function_response.response: missing", where)
            need(self.new or not value.get("parts"), "Multimodal function responses are not supported for this model.")
        blobs = [(INLINE, value)] if kind == "inlineData" else []
        for x in value.get("parts", []) if kind == "functionResponse" else []:
            blob = x.get("inlineData") or dict(x.get("fileData", {}), data="elsewhere")
            blobs.append((IN_RESPONSE if self.strict else INLINE, blob))
        for allowed, blob in blobs:
            need(re.match(allowed, blob.get("mimeType", "")), "Unsupported MIME type: %s", blob.get("mimeType"))
            need(blob.get("data"), "* %s.inline_data.data: must not be empty", where)

    def order(self, contents):
        calls_before, role_before = [], None
        for i, c in enumerate(contents):
            calls, answers = ([p[k] for p in c["parts"] if k in p] for k in ("functionCall", "functionResponse"))
            need(not calls or role_before == "user", CALL_ORDER)
            need(not answers or calls_before, RESPONSE_ORDER)
            need(len(answers) == len(calls_before), COUNT)
            self.our_rule(c.get("role") == ("model" if role_before == "user" else "user"), "role of contents[%d]", i)
            want, got = ([(x.get("id") if self.new else None, x["name"]) for x in y] for y in (calls_before, answers))
            need(sorted(want, key=str) == sorted(got, key=str), "Function responses %s for the calls %s", got, want)
            self.our_rule(want == got, "function responses out of call order in contents[%d]", i)
            first = c["parts"][:len(answers)]
            self.our_rule(all("functionResponse" in p for p in first), "text before responses in contents[%d]", i)
            calls_before, role_before = calls, c.get("role", "user")
        need(not self.new or role_before == "user", "Requests ending with a model turn are not supported.")
        self.our_rule(role_before == "user", "the last content is not the user's")

    def signatures(self, contents):
        """The current turn starts at the last user content with a text and without a function response."""
        kinds = [(c.get("role", "user"), {k for p in c["parts"] for k in p}) for c in contents]
        turns = [i for i, (r, k) in enumerate(kinds) if r == "user" and "text" in k and "functionResponse" not in k]
        for i, c in enumerate(contents):
            calls = [p for p in c["parts"] if "functionCall" in p]
            if calls and self.new and i > max(turns + [-1]):
                need(calls[0].get("thoughtSignature"), MISSING, calls[0]["functionCall"]["name"], i + 1)
            for p in [p for p in c["parts"] if "thoughtSignature" in p]:
                dummy, call = p["thoughtSignature"] in DUMMIES, p.get("functionCall")
                self.our_rule(not call or p is calls[0], "signature on a later call of a set, contents[%d]", i)
                self.our_rule(call or not dummy, "dummy signature on something that is no call, contents[%d]", i)
                if self.issued is not None and not dummy:
                    of = self.issued.get(p["thoughtSignature"].replace("-", "+").replace("_", "/"), ("unknown", {}))
                    need(same_call(call or {}, *of) if of else not call, "Invalid thought signature.")

    def tool(self, tool, where):
        """-> the names that this tool declares."""
        need(any(x or x == {} for x in tool.values()), "* %s.tool_type: required one_of 'tool_type' must have one"
             " initialized field", where)
        for i, f in enumerate(tool.get("functionDeclarations", [])):
            at = "%s.function_declarations[%d]" % (where, i)
            need(re.match(NAME, f.get("name", "")), BAD_NAME, at)
            need(not {"parameters", "parametersJsonSchema"} <= set(f), "* %s: two kinds of parameters", at)
            self.schema(f.get("parameters", {}), at + ".parameters")
            if "parametersJsonSchema" in f:
                self.json_schema(f["parametersJsonSchema"], f["name"])
                self.our_rule(f["parametersJsonSchema"].get("type") == "object", "schema of %s is no object's", f["name"])
            yield f["name"]

    def tool_config(self, config, names, built_in):
        flag, calling = config.get("includeServerSideToolInvocations"), config.get("functionCallingConfig", {})
        allowed, mode = calling.get("allowedFunctionNames", []), calling.get("mode", "AUTO")
        need(not built_in or not names or self.new, "Tool use with function calling is unsupported")
        need(not built_in or not names or flag, "Please enable tool_config.include_server_side_tool_invocations to use"
             " Built-in tools with Function calling.")
        need(not flag or self.new, "Tool call context circulation is not enabled")
        need(names or mode in ("AUTO", "NONE"), "Function calling config is set without function_declarations.")
        need(not allowed or mode in ("ANY", "VALIDATED"), "Allowed function names need the mode ANY or VALIDATED.")
        need(set(allowed) <= set(names), "Allowed function names %s are not all declared.", allowed)

    def schema(self, s, where):
        """The Schema message; its form is checked already."""
        kind, properties, enum = s.get("type"), s.get("properties", {}), s.get("enum", [])
        need(kind != "ARRAY" or "items" in s, "* %s.items: missing field", where)
        need(not enum or kind == "STRING", "* %s.enum: only allowed for STRING type", where)
        need("" not in enum, "* %s.enum[%d]: cannot be empty", where, (enum + [""]).index(""))
        need(kind != "STRING" or s.get("format", "enum") in ("enum", "date-time"), "* %s.format: only 'enum' and"
             " 'date-time' are supported for STRING type", where)
        for i, name in enumerate(s.get("required", [])):
            need(name in properties, "* %s.required[%d]: property is not defined", where, i)
        below = [("properties[%s]" % k, x) for k, x in properties.items()] + [("items", s.get("items", {}))] * ("items" in s)
        for step, sub in below + [("any_of[%d]" % i, x) for i, x in enumerate(s.get("anyOf", []))]:
            self.schema(sub, where + "." + step)

    def json_schema(self, s, where, depth=1):
        """Our rules: the keywords of DESIGN.md 5. Google takes some more, and refuses some for no written reason."""
        def have(ok, what):
            self.our_rule(ok, "schema of %s: %s in %.200s", where, what, s)
        have(isinstance(s, dict) and depth <= 32, "no object, or too deep")
        if not isinstance(s, dict):
            return  # taken when not strict
        kind, enum, properties, required = (s.get(k, d) for k, d in (
            ("type", None), ("enum", ["x"]), ("properties", {}), ("required", [])))
        have(set(s) <= JSON_SCHEMA, sorted(set(s) - JSON_SCHEMA))
        have(kind in (None, "string", "number", "integer", "boolean", "array", "object", "null"), "type")
        have(isinstance(enum, list) and enum and all(isinstance(x, str) and x for x in enum), "enum")
        have("enum" not in s or kind in (None, "string"), "enum of no strings")
        have(all(isinstance(s[k], str) for k in ("description", "title", "pattern", "format") if k in s), "text")
        have(s.get("format", "enum") in FORMATS, "format")
        for k, n in [(k, s[k]) for k in s if k[:3] in ("min", "max")]:
            have(isinstance(n, (int, float)) and not isinstance(n, bool) and (k[3:] == "imum" or n == int(n) >= 0), k)
        have(isinstance(properties, dict) and isinstance(required, list) and set(required) <= set(properties), "required")
        have("anyOf" not in s or isinstance(s["anyOf"], list) and s["anyOf"], "anyOf")
        below = list(properties.values()) + s.get("anyOf", []) + [s[k] for k in ("items",) if k in s]
        for sub in below + [x for x in [s.get("additionalProperties", True)] if not isinstance(x, bool)]:
            self.json_schema(sub, where, depth + 1)

    def generation(self, g, functions):
        top, stops = g.get("maxOutputTokens", 1), g.get("stopSequences", [])
        need(1 <= top <= 65536, "Unable to submit request because it has a maxOutputTokens value of %d but the supported"
             " range is from 1 (inclusive) to 65537 (exclusive). Update the value and try again.", top)
        need(len(stops) <= 5 and all(stops), "* generation_config.stop_sequences: up to 5, not empty; got %s", stops)
        need(0 <= g.get("temperature", 0) <= 2, "* generation_config.temperature: must be in the range [0.0, 2.0].")
        need(0 <= g.get("topP", 0) <= 1, "* generation_config.top_p: must be in the range [0.0, 1.0].")
        gone = {"frequencyPenalty", "presencePenalty", "candidateCount"} & set(g)
        need(not gone or self.version < [3, 6], "%s not supported for this model.", gone)
        as_json = g.get("responseMimeType") == "application/json"
        need(as_json or not {"responseSchema", "responseJsonSchema"} & set(g), "* generation_config: a response schema"
             " needs response_mime_type 'application/json'")
        need(not as_json or not functions or self.new, "Function calling with a response mime type: 'application/json'"
             " is unsupported")
        self.schema(g.get("responseSchema", {}), "generation_config.response_schema")
        self.json_schema(g.get("responseJsonSchema", {}), "responseJsonSchema")
        level, budget = (g.get("thinkingConfig", {}).get(k) for k in ("thinkingLevel", "thinkingBudget"))
        need(level is None or budget is None, "You can only set only one of thinking budget and thinking level.")
        need(level is None or self.new, "Thinking level is not supported for this model.")
        need(level != "XHIGH" and not (level == "MINIMAL" and re.match(NO_MINIMAL, self.model)), "Thinking level %s is"
             " not supported for this model. Please retry with other thinking level.", level)
        need(budget != 0 or self.model != "gemini-2.5-pro", "Budget 0 is invalid. This model only works in thinking mode.")
        low, high = BUDGETS.get(self.model, (0, 65536))
        need(budget in (None, 0, -1) or low <= budget <= high, "The thinking budget %s is invalid. Please choose a value"
             " between %d and %d.", budget, low, high)
        self.our_rule(budget is None or not self.new, "thinkingBudget on %s", self.model)


# ---- 3. Its answers ----------------------------------------------------------------------------------------
def error_body(code, message, status="INVALID_ARGUMENT", **more):
    return {"error": dict({"code": code, "message": message, "status": status}, **more)}


NO_KEY = error_body(403, "Method doesn't allow unregistered callers (callers without established identity). Please use"
                    " API Key or other form of API consumer identity to call this API.", "PERMISSION_DENIED")
BAD_KEY = error_body(400, "API key not valid. Please pass a valid API key.", details=[
    {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID", "domain": "googleapis.com",
     "metadata": {"service": "generativelanguage.googleapis.com"}},
    {"@type": "type.googleapis.com/google.rpc.LocalizedMessage", "locale": "en-US",
     "message": "API key not valid. Please pass a valid API key."}])


def not_found(model, action):
    return error_body(404, "models/%s is not found for API version v1beta, or is not supported for %s. Call"
                      " ModelService.ListModels to see the list of available models and their supported methods."
                      % (model, action), "NOT_FOUND")


def model_info(model):
    return {"name": "models/" + model, "displayName": model, "inputTokenLimit": 1048576, "outputTokenLimit": 65536,
            "supportedGenerationMethods": ["generateContent", "countTokens"], "thinking": True}


def chunks_of(groups, finish="STOP", **candidate):
    """Groups of parts -> chunks of a stream, each with the usage so far: cumulative, zeroes left out."""
    out, usage = [], {"promptTokenCount": 100}
    for i, parts in enumerate(groups):
        for p in parts:
            kind, size = "thoughtsTokenCount" if p.get("thought") else "candidatesTokenCount", len(p.get("text", "x" * 40))
            usage.update({kind: usage.get(kind, 0) + -(-size // 4)} if size else {})
        c = {"content": {"parts": parts, "role": "model"}, "index": 0}
        c.update(dict(candidate, finishReason=finish) if i == len(groups) - 1 else {})
        total = dict(usage, totalTokenCount=sum(usage.values()), serviceTier="standard")
        out.append({"candidates": [c], "usageMetadata": total})
    return out


def merged(chunks):
    """What generateContent sends where a stream would have sent these: texts joined, the signature on them."""
    out, candidate, parts = {}, {}, []
    for chunk in chunks:
        out.update(chunk)
        for c in (chunk.get("candidates") or [])[:1]:
            candidate.update({k: v for k, v in c.items() if k != "content"})
            for p in (c.get("content") or {}).get("parts") or []:
                last = parts[-1] if parts else {}
                joins = "text" in p and "text" in last and last.get("thought") == p.get("thought")
                if joins and "thoughtSignature" not in last:
                    parts[-1] = dict(last, **dict(p, text=last["text"] + p["text"]))
                elif p.get("text") != "" or "thoughtSignature" in p or len(chunks) == 1:
                    parts.append(p)
    if "candidates" in out:
        content = dict({"parts": parts} if parts else {}, role="model")
        out["candidates"] = [dict({"content": content}, **candidate)]
    return out


def repeat(body, model, path):
    """The script of a server that stands alone."""
    texts = [p["text"] for p in body["contents"][-1]["parts"] if p.get("text")]
    return chunks_of([[{"text": "You said: "}], [{"text": texts[-1] if texts else "nothing"}]])


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512  # the usual 5 drops some of 200 connections at once

    def handle_error(self, request, client_address):
        """A proxy that resets is part of the tests."""


class FakeGemini:
    """The server, its script, and what it saw. `issued` is described at refusal()."""

    def __init__(self, script=repeat, port=0):
        self.script, self.requests, self.refusals = script, [], []
        self.issued, self.returned, self.real, self.dummies = {}, set(), 0, 0
        self.connections = []
        self.lock, self.closing = threading.Lock(), threading.Event()  # the lock: for the two lines above
        self.server = FakeServer(("127.0.0.1", port), Handler)
        self.server.fake = self
        self.url = "http://127.0.0.1:%d/v1beta" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.close_idle()

    def close_idle(self):
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    # for scripts
    def sign(self, *call):
        signature = base64.b64encode(os.urandom(150)).decode()
        with self.lock:
            self.issued[signature] = call or None
        return signature

    def says(self, *texts, thought="", finish="STOP", **candidate):
        """An answer in these pieces; its signature stands on an empty part beside the finish."""
        groups = [[{"text": thought, "thought": True}]] * bool(thought) + [[{"text": t}] for t in texts]
        return chunks_of(groups + [[{"text": "", "thoughtSignature": self.sign()}]], finish, **candidate)

    def calls(self, *calls, thought="", text=""):
        """calls: (name, args), each in a chunk of its own; the first is signed."""
        groups = [[{"text": thought, "thought": True}]] * bool(thought) + [[{"text": text}]] * bool(text)
        for i, (name, args) in enumerate(calls):
            call = {"id": "call_%d" % int.from_bytes(os.urandom(4), "big"), "name": name, "args": args}
            groups.append([dict({"functionCall": call}, **{} if i else {"thoughtSignature": self.sign(name, args)})])
        return chunks_of(groups + [[{"text": ""}]])

    # for assertions
    def unreturned(self):
        """Calls whose signature never came back on them."""
        return [call for signature, call in self.issued.items() if call and signature not in self.returned]

    # for the handler
    def answer(self, url, headers, body, client):
        """-> a reply. Notes the request and its signatures."""
        model, _, action = unquote(url.path).partition("/v1beta/models/")[2].rpartition(":")
        note = {"path": url.path, "query": url.query, "headers": {k.lower(): v for k, v in headers.items()},
                "body": body, "model": model, "action": action, "client": client}
        key = headers.get("x-goog-api-key") or headers.get("authorization", "").partition("Bearer ")[2]
        with self.lock:
            self.requests.append(note)
            issued = dict(self.issued)
        if {"key", "access_token"} & set(parse_qs(url.query)):
            problem = "Our rule: THE KEY IS IN THE URL"
        elif not key or key == "bad":
            return BAD_KEY if key else NO_KEY
        elif headers.get("content-type", "").split(";")[0] != "application/json":
            problem = "Our rule: content-type %s" % headers.get("content-type")
        elif "models/" in model:
            problem = "* GenerateContentRequest.model: unexpected model name format"
        elif model not in MODELS or action not in ("generateContent", "streamGenerateContent", "countTokens"):
            return not_found(model, action)
        else:
            problem = count_refusal(body) if action == "countTokens" else refusal(body, model, issued)
        with self.lock:
            if problem:
                self.refusals.append(problem)
                return error_body(400, problem)
            if action == "countTokens":
                return {"totalTokens": len(json.dumps(body)) // 4}
            back = [p["thoughtSignature"] for c in body["contents"] for p in c["parts"] if "thoughtSignature" in p]
            self.dummies += sum(s in DUMMIES for s in back)
            self.real += sum(s not in DUMMIES for s in back)
            self.returned.update(s.replace("-", "+").replace("_", "/") for s in back)
            if not callable(self.script):
                return self.script.pop(0) if self.script else error_body(500, "The script is at its end.", "INTERNAL")
        try:
            return self.script(body, model, url.path)
        except Exception as e:  # pass it on to the test that looks at the refusals
            self.refusals.append("the script failed: %s: %s" % (type(e).__name__, e))
            return error_body(400, self.refusals[-1])


def finished(chunk, body, model):
    """The chunk without thoughts that nobody asked for, and with the fields that every response has."""
    chunk = json.loads(json.dumps(chunk))
    wanted = body.get("generationConfig", {}).get("thinkingConfig", {}).get("includeThoughts")
    for content in [c["content"] for c in chunk.get("candidates", []) if "parts" in c.get("content", {})]:
        content["parts"] = [p for p in content["parts"] if wanted or not p.get("thought")]
        if not content["parts"]:
            del content["parts"]
    return chunk if "error" in chunk else dict({"modelVersion": model, "responseId": "r%x" % id(body)}, **chunk)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # TCP_NODELAY

    def setup(self):
        super().setup()
        self.server.fake.connections.append(self.connection)

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        model = path.partition("/v1beta/models/")[2]
        key = self.headers.get("x-goog-api-key") or self.headers.get("authorization")
        if not key or key == "bad":
            self.send_whole(BAD_KEY if key else NO_KEY)
        elif path == "/v1beta/models":
            self.send_whole({"models": [model_info(m) for m in MODELS]})
        else:
            self.send_whole(model_info(model) if model in MODELS else not_found(model, "get"))

    def do_POST(self):
        raw, url = self.rfile.read(int(self.headers["Content-Length"] or 0)), urlsplit(self.path)
        try:
            body = json.loads(raw.decode())
        except ValueError as e:
            return self.send_whole(error_body(400, "Invalid JSON payload received. %s" % e))
        reply = self.server.fake.answer(url, self.headers, body, self.client_address)
        if isinstance(reply, tuple):
            return self.send_whole(reply[2], reply[0], reply[1])
        if "error" in reply or "totalTokens" in reply:
            return self.send_whole(reply)
        model = url.path.rpartition("/")[2].partition(":")[0]
        items = [finished(x, body, model) if isinstance(x, dict) else x for x in (reply if isinstance(reply, list) else [reply])]
        chunks, waits = [x for x in items if isinstance(x, dict)], [x for x in items if isinstance(x, (int, float, str))]
        if ":stream" not in url.path:
            failed = [x for x in chunks if "error" in x]
            return self.send_whole(failed[0] if failed else merged(chunks), waits=waits)
        if "alt=sse" not in url.query:
            return self.send_whole(chunks, waits=waits)
        frames = [b"data: %s\r\n\r\n" % json.dumps(x).encode() if isinstance(x, dict) else x for x in items]
        frames = [b"%x\r\n%s\r\n" % (len(x), x) if isinstance(x, bytes) else x for x in frames] + [b"0\r\n\r\n"]
        return self.send(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}, frames)

    def send_whole(self, body, status=None, headers=(), waits=()):
        """A body (JSON, or text and bytes as they are) after so many seconds, or as much of it as its end allows."""
        status = status or (body["error"]["code"] if "error" in body else 200)
        data = json.dumps(body, indent=2) if isinstance(body, (dict, list)) else body
        data = data.encode() if isinstance(data, str) else data
        end = next((x for x in waits if isinstance(x, str)), "")
        items = [x for x in waits if not isinstance(x, str)] + [data[:len(data) // 2] if end == "cut" else data]
        usual = {"Content-Type": "application/json; charset=UTF-8", "Content-Length": str(len(data))}
        self.send(status, dict(usual, **dict(headers)), items[:-1] + [end] if end in ("hang", "reset") else items + [end])

    def send(self, status, headers, items):
        """The headers go out with the first bytes."""
        started = False
        for x in items:
            if isinstance(x, (int, float)) or x == "hang":
                self.server.fake.closing.wait(3600 if x == "hang" else x)
            elif x == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())  # socketserver would send a FIN first
            elif isinstance(x, bytes):
                if not started:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                started = True
                try:
                    self.wfile.write(x)
                except OSError:
                    x = "the proxy hung up, because its client did"
            if isinstance(x, str) and x:
                self.close_connection = True
                return


# ---- 4. Helpers --------------------------------------------------------------------------------------------
CONFIG = proxy.Config(gemini_api_key="k1", port=0)
USER = {"role": "user", "content": "hi"}
TOOL = {"name": "Bash", "description": "Run it.", "input_schema": {
    "type": "object", "properties": {"command": {"type": "string"}, "timeout": {"type": "integer"},
                                     "lines": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "note": {"type": ["string", "null"]}},
    "required": ["command"]}}
SIGNATURE = base64.b64encode(b"a signature of Gemini's").decode()
DUMMY = proxy.DUMMY_SIGNATURE
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()
PDF = base64.b64encode(b"%PDF-1.4 " + bytes(20)).decode()
GIF = base64.b64encode(b"GIF89a" + bytes(20)).decode()


def request(*messages, **more):
    """A Messages request; a plain string is a user's text."""
    messages = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages] or [USER]
    return dict({"model": "claude-sonnet-5", "max_tokens": 1000, "messages": messages}, **more)


def says(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def uses(id_="toolu_1", name="Bash", input_=None):
    return {"type": "tool_use", "id": id_, "name": name, "input": {"command": "ls"} if input_ is None else input_}


def results(*ids, **more):
    return {"role": "user", "content": [dict({"type": "tool_result", "tool_use_id": i, "content": "r " + i}, **more) for i in ids]}


def image(data=PNG, media_type="image/png"):
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def call(id_="toolu_1", name="Bash", args=None, signature=None):
    part = {"functionCall": {"id": id_, "name": name, "args": {"command": "ls"} if args is None else args}}
    return dict(part, thoughtSignature=signature) if signature else part


def response(id_="toolu_1", text=None, name="Bash", **more):
    body = {"output": "r " + id_} if text is None else text
    return {"functionResponse": dict({"id": id_, "name": name, "response": body}, **more)}


def user(*parts):
    return {"role": "user", "parts": [{"text": p} if isinstance(p, str) else p for p in parts]}


def model(*parts):
    return {"role": "model", "parts": [{"text": p} if isinstance(p, str) else p for p in parts]}


def chunk(*parts, finish=None, usage=None, **candidate):
    parts = [{"text": p} if isinstance(p, str) else p for p in parts]
    candidate.update({"content": {"role": "model", "parts": parts}} if parts else {})
    candidate.update({"finishReason": finish} if finish else {})
    return dict({"candidates": [candidate]}, **{"usageMetadata": usage} if usage else {})


def check_grammar(events):
    """Assert the order that clients insist on (facts: contiguous indexes, one open block); -> the Message."""
    message, block, done = None, None, False
    for event in events:
        kind = event["type"]
        assert not done, "an event after message_stop"
        if kind == "ping":
            continue
        if kind == "message_start":
            assert message is None
            message = dict(event["message"], content=[])
            assert isinstance(message["usage"]["input_tokens"], int)
            continue
        assert message is not None, "%s before message_start" % kind
        if kind == "content_block_start":
            assert block is None and event["index"] == len(message["content"]), event
            block = dict(event["content_block"], _json="", _signed=False)
            message["content"].append(block)
        elif kind == "content_block_delta":
            assert block is not None and event["index"] == len(message["content"]) - 1, event
            delta = event["delta"]
            own = {"text_delta": "text", "citations_delta": "text", "thinking_delta": "thinking", "signature_delta": "thinking"}
            assert own.get(delta["type"], block["type"]) == block["type"], event
            assert delta["type"] in own or block["type"] in ("tool_use", "server_tool_use"), event
            for key in ("text", "thinking"):
                block[key] = block.get(key, "") + delta[key] if key in delta else block.get(key)
            block["_json"] += delta.get("partial_json", "")
            block["citations"] = (block.get("citations") or []) + ([delta["citation"]] if "citation" in delta else [])
            if "signature" in delta:
                assert not block["_signed"], "a second signature"
                block.update(signature=delta["signature"], _signed=True)
        elif kind == "content_block_stop":
            assert block is not None and event["index"] == len(message["content"]) - 1
            assert block["type"] != "thinking" or block["_signed"], "an unsigned thinking block"
            if block["type"] in ("tool_use", "server_tool_use"):
                block["input"] = json.loads(block["_json"] or "{}")
            block = None
        elif kind == "message_delta":
            assert block is None and event["delta"]["stop_reason"] and "output_tokens" in event["usage"]
            message.update(event["delta"], usage=event["usage"])
        elif kind == "message_stop":
            done = True
        else:
            raise AssertionError(kind)
    assert done, "no message_stop"
    return message


def summary(message):
    """What a reader of a message gets: [("text", "..."), ("tool_use", name, input), ...]."""
    shown = {"text": lambda b: b["text"], "thinking": lambda b: b["thinking"], "tool_use": lambda b: (b["name"], b["input"]),
             "server_tool_use": lambda b: (b["name"], b["input"])}
    return [(b["type"], shown.get(b["type"], lambda b: b["content"])(b)) for b in message["content"]]


def emitted(chunks, **request_fields):
    """-> (Message, remembered signatures) of a whole answer through one emitter."""
    translation = proxy.to_gemini(request(**request_fields), "gemini-3.8-flash", CONFIG)
    remembered = {}
    ids = ("%s%d" % (prefix, i) for i in itertools.count() for prefix in [""])
    emitter = proxy.MessageEmitter("claude-x", lambda prefix: prefix + next(ids), remembered.__setitem__, translation, 7)
    return check_grammar(proxy.events_from_gemini(chunks, emitter)), remembered


class Running:
    """A proxy on a free port before a FakeGemini; `with Running(script, setting=...) as r`."""

    def __init__(self, script=repeat, upstream=None, **settings):
        self.fake = FakeGemini(script)
        settings.setdefault("gemini_api_base", self.fake.url)
        self.config = dataclasses.replace(CONFIG, **settings)
        self.server = proxy.make_server(self.config, upstream)
        for member in getattr(self.server.upstream, "members", {}).values():
            member.BACKOFF_SECONDS = 0.005
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
        self.fake.__exit__()

    def send(self, method, path, body=None, **headers):
        """-> (status, headers, bytes); underscores in header names become dashes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        body = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        return reply.status, reply.headers, data

    def ask(self, body, **headers):
        """POST /v1/messages -> (status, parsed JSON or list of events)."""
        status, head, data = self.send("POST", "/v1/messages?beta=true", body, **headers)
        assert head["request-id"].startswith("req_")
        if "event-stream" not in head["content-type"]:
            return status, json.loads(data)
        return status, events_of(data)

    def raw(self, data):
        """Bytes as they are -> everything that comes back until the proxy closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(data)
            with contextlib.suppress(OSError):  # the proxy may have hung up already
                sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))


def events_of(data):
    events = []
    for frame in data.decode().strip().split("\n\n"):
        name, line = frame.split("\n")
        event = json.loads(line[len("data: "):])
        assert name == "event: " + event["type"], frame
        events.append(event)
    return events


# ---- 5. Requests -------------------------------------------------------------------------------------------
THINK = {"thinking": {"type": "adaptive"}}
CARRIED = {"type": "thinking", "thinking": "", "signature": proxy.CALL_MARK + SIGNATURE}
LONG_A, LONG_B = "mcp__" + "server_" * 12 + "alpha", "mcp__" + "server_" * 12 + "bravo"
REQUEST_CASES = (  # name, request, the fields that the Gemini body must have
    ("a plain string", request(), {"contents": [user("hi")]}),
    ("system blocks without the billing line", request(system=[
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197"},
        {"type": "text", "text": "You are helpful.", "cache_control": {"type": "ephemeral"}}]),
     {"systemInstruction": {"parts": [{"text": "You are helpful."}]}}),
    ("a leading system message joins the system prompt", request({"role": "system", "content": "S2"}, "hi", system="S1"),
     {"systemInstruction": {"parts": [{"text": "S1"}, {"text": "S2"}]}, "contents": [user("hi")]}),
    ("a later system message is a reminder beside the user's text",
     request("hi", {"role": "system", "content": "Be brief."}, says({"type": "text", "text": "ok"}), "go"),
     {"contents": [user("hi", proxy.REMINDER % "Be brief."), model("ok"), user("go")]}),
    ("a system message between call and result stands after the result",
     request("hi", says(uses()), {"role": "system", "content": [{"type": "text", "text": "S"}]}, results("toolu_1")),
     {"contents": [user("hi"), model(call(signature=DUMMY)), user(response(), proxy.REMINDER % "S")]}),
    ("a system message of effort only", request("hi", {"role": "system", "content": [], "output_config": {"effort": "low"}},
                                                output_config={"effort": "max"}, **THINK),
     {"contents": [user("hi")], "generationConfig": {"maxOutputTokens": 1000, "thinkingConfig": {
         "includeThoughts": True, "thinkingLevel": "LOW"}}}),
    ("neighbours of one role merge, empty texts go",
     request("a", {"role": "user", "content": [{"type": "text", "text": ""}, {"type": "text", "text": "b"}]},
             says({"type": "text", "text": ""}), "c"), {"contents": [user("a", "b", "c")]}),
    ("a history that starts and ends with the model", request(says({"type": "text", "text": "a"}), "b", says({"type": "text", "text": "c"})),
     {"contents": [user(proxy.CONTINUE), model("a"), user("b"), model("c"), user(proxy.CONTINUE)]}),
    ("results in completion order", request("hi", says(uses("a"), uses("b")), results("b", "a")),
     {"contents": [user("hi"), model(call("a", signature=DUMMY), call("b")), user(response("a"), response("b"))]}),
    ("a call without a result", request("hi", says(uses("a"), uses("b")), results("b"), says(uses("c"))),
     {"contents": [user("hi"), model(call("a", signature=DUMMY), call("b")),
                   user(response("a", {"error": proxy.NO_RESULT}), response("b")), model(call("c", signature=DUMMY)),
                   user(response("c", {"error": proxy.NO_RESULT}))]}),
    ("a result without a call, and one twice", request("hi", says(uses("a")), results("gone", "a", "a")),
     {"contents": [user("hi"), model(call("a", signature=DUMMY)), user(response("a"), "Result of an earlier tool call:\nr gone")]}),
    ("a failed tool", request("hi", says(uses()), results("toolu_1", is_error=True)),
     {"contents": [user("hi"), model(call(signature=DUMMY)), user(response(text={"error": "r toolu_1"}))]}),
    ("a result without content", request("hi", says(uses()), {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]}),
     {"contents": [user("hi"), model(call(signature=DUMMY)), user(response(text={"output": ""}))]}),
    ("ids that are empty, long or not ASCII", request("hi", says(uses(""), uses(""), uses("ü" * 4000)), {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": i, "content": t} for i, t in (("", "1"), ("ü" * 4000, "3"), ("", "2"))]}),
     {"contents": [user("hi"),
                   model(call("call_" + proxy.short_hash(""), signature=DUMMY), call("call_%s_1" % proxy.short_hash("")),
                         call("call_" + proxy.short_hash("ü" * 4000))),
                   user(response("call_" + proxy.short_hash(""), {"output": "1"}),
                        response("call_%s_1" % proxy.short_hash(""), {"output": "2"}),
                        response("call_" + proxy.short_hash("ü" * 4000), {"output": "3"}))]}),
    ("input that is no object", request("hi", says(uses(input_=[1])), results("toolu_1")),
     {"contents": [user("hi"), model(call(args={"value": [1]}, signature=DUMMY)), user(response())]}),
    ("a carried signature, and a foreign one", request("hi", says(CARRIED, uses()), results("toolu_1"), says(
        {"type": "thinking", "thinking": "t", "signature": "EqoBCkgIAR"}, uses("b")), results("b")),
     {"contents": [user("hi"), model(call(signature=SIGNATURE)), user(response()), model(call("b", signature=DUMMY)), user(response("b"))]}),
    ("a carried signature that is no base64", request("hi", says(dict(CARRIED, signature=proxy.CALL_MARK + "?"), uses()), results("toolu_1")),
     {"contents": [user("hi"), model(call(signature=DUMMY)), user(response())]}),
    ("a signed thought", request("hi", says({"type": "thinking", "thinking": "t", "signature": proxy.THOUGHT_MARK + SIGNATURE},
                                            {"type": "text", "text": "x"}), "go"),
     {"contents": [user("hi"), model({"text": "t", "thought": True, "thoughtSignature": SIGNATURE}, "x"), user("go")]}),
    ("remembered signatures", request("hi", says({"type": "text", "text": "known"}, uses("known")), results("known")),
     {"contents": [user("hi"), model({"text": "known", "thoughtSignature": SIGNATURE}, call("known", signature=SIGNATURE)), user(response("known"))]}),
    ("an image in a tool result", request("hi", says(uses()), {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "see"}, image()]}]}),
     {"contents": [user("hi"), model(call(signature=DUMMY)),
                   user(response(text={"output": "see"}, parts=[{"inlineData": {"mimeType": "image/png", "data": PNG}}]))]}),
    ("a PDF beside a tool result", request("hi", says(uses()), {"role": "user", "content": [
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}},
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "r toolu_1"}]}),
     {"contents": [user("hi"), model(call(signature=DUMMY)), user(response(), {"inlineData": {"mimeType": "application/pdf", "data": PDF}})]}),
    ("media of other kinds", request({"role": "user", "content": [
        image(media_type="image/jpeg"), {"type": "image", "source": {"type": "url", "url": "https://x.org/a.webp"}},
        {"type": "image", "source": {"type": "url", "url": "data:image/png;base64," + PNG}},
        {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "C"}]}},
        {"type": "search_result", "title": "R", "source": "u", "content": [{"type": "text", "text": "S"}]}]}),
     {"contents": [user({"inlineData": {"mimeType": "image/png", "data": PNG}},
                        {"fileData": {"mimeType": "image/webp", "fileUri": "https://x.org/a.webp"}},
                        {"inlineData": {"mimeType": "image/png", "data": PNG}}, "T", "D", "C", "Search result: R (u)\nS")]}),
    ("a compaction stands for all before it", request("old", says({"type": "compaction", "content": "Sum."}, {"type": "text", "text": "a"}), "go"),
     {"contents": [user("Summary of the conversation so far:\nSum."), model("a"), user("go")]}),
    ("blocks that nobody knows", request({"role": "user", "content": [{"type": "new", "x": 1, "cache_control": {}}]}),
     {"contents": [user('{"type": "new", "x": 1}')]}),
    ("tool_choice of a long name", request(tools=[{"name": LONG_A, "input_schema": {"type": "object"}},
                                                  {"name": LONG_B, "input_schema": {"type": "object"}}], tool_choice={"type": "tool", "name": LONG_B}),
     {"tools": [{"functionDeclarations": [{"name": proxy.gemini_name(n), "description": "", "parametersJsonSchema": {"type": "object"}}
                                          for n in (LONG_A, LONG_B)]}],
      "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": [proxy.gemini_name(LONG_B)]}}}),
    ("tool_choice without tools", request(tool_choice={"type": "any"}), {"toolConfig": None, "tools": None}),
    ("deferred tools wait for their reference", request("hi", says(uses("t", "ToolSearch", {})), {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "tool_reference", "tool_name": "B"}]}]}, tools=[
            {"name": n, "defer_loading": n != "ToolSearch", "input_schema": {"type": "object"}}
            for n in ("ToolSearch", "A", "B", "DeferredToolPlaceholder")]),
     {"tools": [{"functionDeclarations": [{"name": n, "description": "", "parametersJsonSchema": {"type": "object"}} for n in ("ToolSearch", "B")]}]}),
    ("web search alone", request(tools=[{"type": "web_search_20250305", "name": "web_search", "allowed_domains": ["a.org"]}],
                                 tool_choice={"type": "tool", "name": "web_search"}),
     {"tools": [{"googleSearch": {}}], "toolConfig": None,
      "systemInstruction": {"parts": [{"text": "Search and cite only these sites: a.org."}]}}),
    ("web search beside functions", request(tools=[{"type": "web_search_20250305", "name": "web_search"}, TOOL]),
     {"tools": [{"functionDeclarations": [{"name": "Bash", "description": "Run it.", "parametersJsonSchema": proxy.to_gemini_schema(TOOL["input_schema"])}]},
                {"googleSearch": {}}], "toolConfig": {"includeServerSideToolInvocations": True}}),
    ("an answer in JSON", request(output_config={"format": {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"const": "x"}}}}}),
     {"generationConfig": {"maxOutputTokens": 9192, "responseMimeType": "application/json", "thinkingConfig": {"thinkingLevel": "LOW"},
                           "responseJsonSchema": {"type": "object", "properties": {"a": {"type": "string", "enum": ["x"]}}}}}),
    ("sampling, stops and a large limit", request(max_tokens=128000, temperature=1, top_p=0.5, top_k=3, stop_sequences=["END"], **THINK),
     {"generationConfig": {"maxOutputTokens": 60000, "temperature": 1, "topP": 0.5, "topK": 3, "stopSequences": ["END"],
                           "thinkingConfig": {"includeThoughts": True}}}),
    ("what changes nothing is ignored", request(context_management={"edits": []}, safeguards=[{}], metadata={"user_id": "x"}, betas=1,
                                                service_tier="auto", brand_new={"a": 1}), {"contents": [user("hi")]}),
)
OLD_MODEL_CASES = (  # the same for gemini-2.5-pro
    ("media of a tool result stand behind all responses", request("hi", says(uses("a"), uses("b")), {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "a", "content": [image()]}, {"type": "tool_result", "tool_use_id": "b", "content": "r b"}]}),
     {"contents": [user("hi"), model(call("a"), call("b")), user(response("a", {"output": ""}), response("b"),
                                                                  {"inlineData": {"mimeType": "image/png", "data": PNG}})]}),
    ("web search goes where functions are", request(tools=[{"type": "web_search_20250305", "name": "web_search"}, TOOL]), {
        "tools": [{"functionDeclarations": [{"name": "Bash", "description": "Run it.", "parametersJsonSchema": proxy.to_gemini_schema(TOOL["input_schema"])}]}], "toolConfig": None}),
)
THINKING_CASES = (  # model, request fields, thinkingConfig, maxOutputTokens
    ("gemini-3.8-flash", {}, {"thinkingLevel": "LOW"}, 9192),
    ("gemini-3.5-flash-lite", {}, {"thinkingLevel": "MINIMAL"}, 9192),
    ("gemini-4-argon", dict(THINK), {"includeThoughts": True}, 1000),
    ("gemini-3.8-flash", dict(THINK, output_config={"effort": "max"}), {"includeThoughts": True, "thinkingLevel": "HIGH"}, 1000),
    ("gemini-3.8-flash", {"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, {"thinkingLevel": "LOW"}, 9192),
    ("gemini-3.8-flash", {"thinking": {"type": "enabled", "budget_tokens": 31999}}, {"includeThoughts": True, "thinkingLevel": "HIGH"}, 1000),
    ("gemini-2.5-pro", {}, {"thinkingBudget": 128}, 9192),
    ("gemini-2.5-pro", dict(THINK), {"includeThoughts": True, "thinkingBudget": -1}, 1000),
    ("gemini-2.5-flash", {}, {"thinkingBudget": 0}, 1000),
    ("gemini-2.5-flash", {"thinking": {"type": "enabled", "budget_tokens": 31999}, "max_tokens": 32000},
     {"includeThoughts": True, "thinkingBudget": 24576}, 32000),
    ("gemini-2.5-flash-lite", {"thinking": {"type": "enabled", "budget_tokens": 100}}, {"includeThoughts": True, "thinkingBudget": 512}, 1000),
    ("gemini-2.5-flash", {"thinking": {"type": "enabled", "budget_tokens": 31999}, "max_tokens": 90000}, {"includeThoughts": True, "thinkingBudget": 24576}, 60000),
    ("gemini-2.0-flash", dict(THINK), None, 1000),
)
BAD_REQUESTS = (  # request, how the message starts
    ([], "The body must be a JSON object"), ({}, "model: "), ({"model": "m"}, "messages: "), (request(max_tokens=0), "max_tokens: "),
    (request(max_tokens="9"), "max_tokens: must be an integer, not a string"), (request(stream=1), "stream: "),
    (request({"role": "user", "content": [image("=" + "A" * 19)]}), "messages[0].content[0].source.data: could not process image"),
    (request({"role": "user", "content": [image(PNG, ["image"])]}), "messages[0].content[0].source.media_type: must be a string, not a list"),
    (request({"role": "tool", "content": ""}), "messages[0].role: "), (request(1), "messages[0]: must be an object"),
    (request({"role": "user", "content": [{"type": "text", "text": 1}]}), "messages[0].content[0].text: must be a string, not an integer"),
    (request({"role": "user", "content": [{}]}), "messages[0].content[0].type: "), (request({"role": "user", "content": 5}), "messages[0].content: "),
    (request("x", says({"type": "tool_use", "id": 5, "name": "B"})), "messages[1].content[0].id: "),
    (request("x", says({"type": "tool_use", "id": "5"})), "messages[1].content[0].name: "),
    (request({"role": "user", "content": [image(GIF, "image/gif")]}), "messages[0].content[0].source.media_type: could not process image"),
    (request({"role": "user", "content": [image("A")]}), "messages[0].content[0].source.data: could not process image"),
    (request({"role": "user", "content": [{"type": "document", "source": {"type": "base64", "media_type": "text/plain", "data": "é"}}]}), "messages[0].content[0].source.data: "),
    (request({"role": "user", "content": [{"type": "compaction", "content": "x", "tool_changes": ["x", {"type": "tool_addition"}]}]}), "messages[0].content[0].tool_changes[1].tool: "),
    (request({"role": "user", "content": [image("")]}), "messages[0].content[0].source.data: image cannot be empty"),
    (request({"role": "user", "content": [image("no base64!")]}), "messages[0].content[0].source.data: could not process image"),
    (request({"role": "user", "content": [{"type": "document", "source": {"type": "file", "file_id": "f"}}]}), "messages[0].content[0].source: "),
    (request({"role": "user", "content": [{"type": "container_upload", "file_id": "f"}]}), "messages[0].content[0]: "),
    (request(system=[{"type": "image"}]), "system[0].type: "), (request(tools=[{}]), "tools[0].name: "), (request(tools=[1]), "tools[0]: "),
    (request(tools=[dict(TOOL, input_schema=[])]), "tools[0].input_schema: "), (request(tools=[TOOL], tool_choice={"type": "x"}), "tool_choice.type: "),
    (request(tools=[{"type": "computer_20251124", "name": "computer"}]), "tools[0]: "), (request(stop_sequences=[" "]), "stop_sequences[0]: "),
    (request(stop_sequences=list("abcdef")), "stop_sequences: "), (request(mcp_servers=[{}]), "mcp_servers: "),
    (request(thread={"type": "create"}), "thread: "), (request(output_config={"format": {"type": "xml"}}), "output_config.format.type: "),
)


class Requests(unittest.TestCase):

    def test_requests_are_translated_to_what_gemini_takes(self):
        lookup = {"known": SIGNATURE, proxy.text_key("known", proxy.short_hash("hi")): SIGNATURE}.get
        for gemini_model, cases in (("gemini-3.8-flash", REQUEST_CASES), ("gemini-2.5-pro", OLD_MODEL_CASES)):
            for name, given, expected in cases:
                with self.subTest(name):
                    before = copy.deepcopy(given)
                    body = proxy.to_gemini(proxy.check_request(given), gemini_model, CONFIG, lookup).body
                    self.assertEqual({key: body.get(key) for key in expected}, expected)
                    self.assertEqual(given, before, "the request was changed")
                    self.assertIsNone(refusal(body, gemini_model))
                    self.assertIsNone(refusal(proxy.with_strict_tools(body), gemini_model))

    def test_thinking_follows_the_family(self):
        for gemini_model, fields, thinking, limit in THINKING_CASES:
            with self.subTest(gemini_model, fields=fields):
                generation = proxy.to_gemini(request(**fields), gemini_model, CONFIG).body["generationConfig"]
                self.assertEqual((generation.get("thinkingConfig"), generation["maxOutputTokens"]), (thinking, limit))

    def test_bad_requests_name_the_path(self):
        for given, start in BAD_REQUESTS:
            with self.subTest(start):
                with self.assertRaises(proxy.ProxyError) as caught:
                    proxy.to_gemini(proxy.check_request(given), "gemini-3.8-flash", CONFIG)
                self.assertEqual((caught.exception.status, caught.exception.type), (400, "invalid_request_error"))
                self.assertTrue(caught.exception.message.startswith(start), caught.exception.message)

    def test_a_growing_history_keeps_its_bytes(self):
        messages = ["hi", {"role": "system", "content": "S"}]
        bodies = []
        for i in range(4):
            bodies.append(proxy.to_gemini(request(*messages, tools=[TOOL]), "gemini-3.8-flash", CONFIG).body)
            messages += [says(uses("id%d" % i)), results("id%d" % i)]
        for shorter, longer in zip(bodies, bodies[1:]):
            self.assertEqual(shorter["tools"], longer["tools"])
            self.assertEqual(shorter["contents"], longer["contents"][:len(shorter["contents"])])

    def test_model_names(self):
        config = dataclasses.replace(CONFIG, big_model="gemini-4-argon", sonnet_model="gemini-3.6-flash", model_map=(("my-*", "gemini-2.5-pro"), ("prefixed", "models/gemini-2.5-pro[1m]")))
        for name, expected in (("claude-opus-5-5[1m]", "gemini-4-argon"), ("claude-sonnet-5[1M][1m]", "gemini-3.6-flash"),
                               ("claude-haiku-4-5-20251001", "gemini-3.5-flash-lite"), ("claude-fable-5", "gemini-4-argon"),
                               ("my-own", "gemini-2.5-pro"), ("models/gemini-2.5-flash", "gemini-2.5-flash"), ("gpt-9", "gemini-3.8-flash"),
                               ("claude-gemini-4-argon", "gemini-4-argon"), ("anthropic/gemini-3.6-flash", "gemini-3.6-flash"), ("prefixed", "gemini-2.5-pro")):
            self.assertEqual(proxy.resolve_model(name, config).name, expected, name)
        self.assertEqual(proxy.resolve_model("x", dataclasses.replace(config, anthropic_model="gemini-2.5-pro")).name, "gemini-2.5-pro")
        for name in ("gemini-x/../../y", "gemini-3?key=1", "gemini-3:generateContent#", "models/gemini-a b"):
            with self.assertRaises(proxy.ProxyError):
                proxy.to_gemini(request(), proxy.resolve_model(name, config).model, config)


# ---- 6. Schemas --------------------------------------------------------------------------------------------
ANY = proxy._any_value()
S = {"type": "string"}
SCHEMA_CASES = (
    ("keywords as names", {"type": "object", "properties": {n: {"type": "string"} for n in (
        "title", "default", "$schema", "type", "properties", "enum", "required", "$ref")}, "required": ["$ref"]},
     {"type": "object", "properties": {n: S for n in ("title", "default", "$schema", "type", "properties", "enum", "required", "$ref")}, "required": ["$ref"]}),
    ("a type list", {"type": ["string", "null"], "maxLength": 5}, {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]}),
    ("oneOf with a const", {"oneOf": [{"const": "a"}, {"const": 1}]}, {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "integer", "description": "(one of: 1)"}]}),
    ("allOf", {"allOf": [{"properties": {"a": {"type": "string"}}, "required": ["a"]}, {"properties": {"b": {"type": "string"}}}]},
     {"type": "object", "properties": {"b": S, "a": S}, "required": ["a"]}),
    ("a ref", {"type": "object", "properties": {"a": {"$ref": "#/$defs/A", "description": "d"}}, "$defs": {"A": {"type": "string", "description": "x"}}},
     {"type": "object", "properties": {"a": {"type": "string", "description": "d"}}}),
    ("a cycle", {"type": "object", "properties": {"next": {"$ref": "#"}}},
     {"type": "object", "properties": {"next": {"type": "object", "properties": {"next": {"type": "object", "description": "same form as the whole"}}}}}),
    ("no type", {"type": "object", "properties": {"a": {}, "b": True, "c": {"description": "d"}, "e": {"enum": ["x"]}}},
     {"type": "object", "properties": {"a": ANY, "b": ANY, "c": dict(ANY, description="d"), "e": {"type": "string", "enum": ["x"]}}}),
    ("an enum of many types", {"enum": ["a", 1, None, ""]}, {"anyOf": [
        {"type": "integer", "description": '(one of: "a", 1, null, "")'}, {"type": "null"}, {"type": "string", "enum": ["a"], "description": '(or "" (empty))'}]}),
    ("what is lost is told", {"type": "number", "exclusiveMinimum": 3, "multipleOf": 2, "description": "D"},
     {"type": "number", "description": "D (exclusiveMinimum: 3; multipleOf: 2)"}),
    ("a tuple", {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False},
     {"type": "array", "items": {"anyOf": [S, {"type": "integer"}]}}),
    ("huge bounds", {"type": "integer", "maximum": 1.8446744073709552e19, "minimum": 0}, {"type": "integer", "minimum": 0}),
    ("malformed nodes", {"type": "object", "properties": {"a": 5, "b": {"type": "array"}}, "required": True},
     {"type": "object", "properties": {"a": ANY, "b": {"type": "array", "items": ANY}}}),
    ("allOf does not use up depth", {"type": "object", "allOf": [{"title": "x"}] * 30, "properties": {"k": {"type": "string"}}},
     {"type": "object", "properties": {"k": S}, "title": "x"}),
    ("a ref to an anchor", {"type": "object", "properties": {"a": {"$ref": "#addr"}}}, {"type": "object", "properties": {"a": {"type": "object", "description": "same form as addr"}}}),
    ("capital types", {"type": "OBJECT", "properties": {"a": {"type": "STRING", "format": "uuid"}}},
     {"type": "object", "properties": {"a": {"type": "string", "description": "(format: uuid)"}}}),
    ("siblings of anyOf go into the branches", {"type": "object", "properties": {"a": {"type": "string"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
     {"anyOf": [{"type": "object", "properties": {"a": S}, "required": ["a"]}, {"type": "object", "properties": {"a": S}}]}),
)


class Schemas(unittest.TestCase):

    def test_schemas_become_what_gemini_takes(self):
        for name, given, expected in SCHEMA_CASES:
            with self.subTest(name):
                before = copy.deepcopy(given)
                self.assertEqual(proxy.to_gemini_schema(given), expected)
                self.assertEqual(given, before)
                self.check(given)

    def test_schemas_that_unfold_without_end_are_bounded(self):
        schema = {"$defs": {"a%d" % i: {"allOf": [{"$ref": "#/$defs/a%d" % (i + 1)}] * 3} for i in range(30)}, "$ref": "#/$defs/a0"}
        started = time.monotonic()
        self.assertEqual(proxy.to_gemini_schema(schema, root=True)["type"], "object")
        self.assertLess(time.monotonic() - started, 2)

    def test_a_root_is_always_an_object(self):
        for given in ({}, {"type": "string"}, {"$ref": "https://x.org/s.json"}, {"anyOf": [{"type": "object", "properties": {"a": {}}}, {"type": "null"}]}):
            with self.subTest(given):
                self.assertEqual(proxy.to_gemini_schema(given, root=True)["type"], "object")
                self.check(given)

    def test_depth_and_size_are_bounded(self):
        deep = {"type": "string"}
        for _ in range(200):
            deep = {"type": "object", "properties": {"a": deep}}
        wide = {"$defs": {"d%d" % i: {"type": "object", "properties": {k: {"$ref": "#/$defs/d%d" % (i + 1)} for k in "abc"}} for i in range(30)},
                "$ref": "#/$defs/d0"}
        for given in (deep, wide):
            self.check(given)
            self.assertLess(len(json.dumps(proxy.to_gemini_schema(given))), 1 << 20)

    def check(self, schema):
        body = proxy.to_gemini(request(tools=[{"name": "t", "input_schema": schema}]), "gemini-3.8-flash", CONFIG).body
        self.assertIsNone(refusal(body, "gemini-3.8-flash"))
        self.assertIsNone(refusal(proxy.with_strict_tools(body), "gemini-3.8-flash"))


# ---- 7. Answers --------------------------------------------------------------------------------------------
BASH = {"functionCall": {"name": "Bash", "args": {"command": "ls"}}}
USED = ("tool_use", ("Bash", {"command": "ls"}))
SIGNED = dict(BASH, thoughtSignature=SIGNATURE)
GROUNDING = {"webSearchQueries": ["q1", "q2"], "groundingChunks": [{"web": {"uri": "https://a.org", "title": "A"}}, {"web": {"uri": "https://b.org", "title": "B"}}],
             "groundingSupports": [{"segment": {"endIndex": 3, "text": "It."}, "groundingChunkIndices": [0, 1]}]}
RESPONSE_CASES = (  # name, chunks, blocks, stop_reason
    ("text", [chunk("Hel"), chunk("lo", finish="STOP")], [("text", "Hello")], "end_turn"),
    ("text and a signature beside STOP", [chunk("Hello"), chunk({"text": "", "thoughtSignature": SIGNATURE}, finish="STOP")], [("text", "Hello")], "end_turn"),
    ("a thought, then text", [chunk({"text": "T1", "thought": True}), chunk({"text": "T2", "thought": True}), chunk("a", finish="STOP")],
     [("thinking", "T1T2"), ("text", "a")], "end_turn"),
    ("a call, then an empty text beside STOP", [chunk(BASH), chunk("", finish="STOP")], [USED], "tool_use"),
    ("a signed call behind a thought", [chunk({"text": "T", "thought": True}), chunk(SIGNED, finish="STOP")], [("thinking", "T"), USED], "tool_use"),
    ("a signed call behind a text", [chunk("a"), chunk(SIGNED, finish="STOP")], [("text", "a"), ("thinking", ""), USED], "tool_use"),
    ("parallel calls in several chunks", [chunk(SIGNED), chunk(BASH), chunk(BASH, finish="STOP")], [("thinking", ""), USED, USED, USED], "tool_use"),
    ("one call sent twice", [chunk(call("c1")), chunk(call("c1"), finish="STOP")], [USED], "tool_use"),
    ("STOP on more than one chunk", [chunk("a", finish="STOP"), chunk("b", finish="STOP")], [("text", "ab")], "end_turn"),
    ("chunks without content or candidates", [{}, {"candidates": []}, {"candidates": None}, chunk(), chunk("a"), chunk(finish="STOP")], [("text", "a")], "end_turn"),
    ("another candidate", [{"candidates": [{"index": 1, "content": {"parts": [{"text": "no"}]}}, {"content": {"parts": [{"text": "yes"}]}, "finishReason": 1}]}],
     [("text", "yes")], "end_turn"),
    ("max tokens", [chunk("a", finish="MAX_TOKENS")], [("text", "a")], "max_tokens"),
    ("max tokens with nothing said", [chunk(finish="MAX_TOKENS")],
     [("text", "[The model used its whole limit to think; raise max_tokens or lower the effort.]")], "max_tokens"),
    ("max tokens after a call", [chunk(BASH, finish="MAX_TOKENS")], [USED], "tool_use"),
    ("blocked output", [chunk("a"), chunk(finish="SAFETY")], [("text", "a\n\n[The model stopped this answer: SAFETY.]")], "refusal"),
    ("blocked prompt", [{"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}], [("text", "[The model refused this prompt: PROHIBITED_CONTENT.]")], "refusal"),
    ("recitation", [chunk(finish="RECITATION")], [("text", "[The model stopped this answer: RECITATION (too close to a source).]")], "end_turn"),
    ("a malformed call", [chunk(finish="MALFORMED_FUNCTION_CALL", finishMessage="Why.")], [("text", "[The model wrote a tool call that cannot be read. Why.]")], "end_turn"),
    ("a reason that nobody knows", [chunk("a", finish="BRAND_NEW")], [("text", "a\n\n[The model stopped this answer: BRAND_NEW.]")], "end_turn"),
    ("nothing", [chunk("", finish="STOP")], [("text", "[The model gave an empty answer.]")], "end_turn"),
    ("code that ran", [chunk({"executableCode": {"language": "PYTHON", "code": "1+1"}}), chunk({"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "2"}}, "2.", finish="STOP")],
     [("server_tool_use", ("code_execution", {"code": "1+1"})), ("code_execution_tool_result", {
         "type": "code_execution_result", "stdout": "2", "stderr": "", "return_code": 0, "content": []}), ("text", "2.")], "end_turn"),
    ("an image", [chunk("see", {"inlineData": {"mimeType": "image/png", "data": PNG}}, finish="STOP")], [("text", "see\n\n![image/png](data:image/png;base64,%s)" % PNG)], "end_turn"),
    ("a search", [chunk("It."), chunk(finish="STOP", groundingMetadata=GROUNDING)],
     [("text", "It."), ("server_tool_use", ("web_search", {"query": "q1; q2"})), ("web_search_tool_result", [
         {"type": "web_search_result", "url": u, "title": t, "encrypted_content": "", "page_age": None} for u, t in (("https://a.org", "A"), ("https://b.org", "B"))])], "end_turn"),
    ("a name with the model's own prefix", [chunk({"functionCall": {"name": "default_api:bash", "args": {"command": "ls"}}}, finish="STOP")], [USED], "tool_use"),
    ("arguments in need of repair", [chunk({"functionCall": {"name": "Bash", "args": {"command": 5, "timeout": "7", "x": None}}}, finish="STOP")],
     [("tool_use", ("Bash", {"command": "5", "timeout": 7, "x": None}))], "tool_use"),
    ("optional arguments that say nothing", [chunk({"functionCall": {"name": "Bash", "args": {"command": "", "timeout": None}}}, finish="STOP")],
     [("tool_use", ("Bash", {"command": ""}))], "tool_use"),
    ("an optional argument of a union", [chunk({"functionCall": {"name": "Bash", "args": {"command": "ls", "lines": "5", "note": ""}}}, finish="STOP")],
     [("tool_use", ("Bash", {"command": "ls", "lines": 5}))], "tool_use"),
    ("a signed toolCall beside text", [chunk("a", {"toolCall": {"toolType": "GOOGLE_SEARCH_WEB"}, "thoughtSignature": "eHh4"}, finish="STOP")], [("text", "a")], "end_turn"),
    ("a call without arguments", [chunk({"functionCall": {"name": "Bash"}}, finish="STOP")], [("tool_use", ("Bash", {}))], "tool_use"),
)


def cut(chunks, rng):
    """The same answer with its texts cut at random points, and a part to a chunk."""
    out = []
    for piece in chunks:
        candidates = piece.get("candidates") or [{}]
        parts = (candidates[0].get("content") or {}).get("parts") or [] if len(candidates) == 1 else []
        for part in parts:
            text = part.get("text") or ""
            at = rng.randrange(1, len(text)) if len(text) > 1 and "thoughtSignature" not in part else 0
            pieces = [dict(part, text=text[:at]), dict(part, text=text[at:])] if at else [part]
            out += [{"candidates": [{"content": {"parts": [p]}}]} for p in pieces]
        rest = dict(candidates[0], content={}) if parts else candidates[0]
        out.append(dict(piece, candidates=[rest]) if len(candidates) == 1 else piece)
    return out


class Answers(unittest.TestCase):

    def test_every_cut_of_an_answer_gives_the_same_message(self):
        rng = random.Random(SEED)
        for name, chunks, blocks, reason in RESPONSE_CASES:
            for how in ([chunks, [merged(chunks)] if all(len(c.get("candidates") or []) == 1 for c in chunks) else chunks]
                        + [cut(chunks, rng) for _ in range(8)]):
                with self.subTest(name, chunks=how):
                    message, _ = emitted(copy.deepcopy(how), tools=[TOOL], **THINK)
                    self.assertEqual((summary(message), message["stop_reason"]), (blocks, reason))

    def test_without_thinking_there_are_no_thinking_blocks(self):
        for name, chunks, blocks, reason in RESPONSE_CASES:
            with self.subTest(name):
                message, _ = emitted(copy.deepcopy(chunks), tools=[TOOL])
                self.assertEqual([b for b in summary(message)], [b for b in blocks if b[0] != "thinking"])

    def test_omitted_thinking_shows_no_thought_but_carries_signatures(self):
        message, _ = emitted([chunk({"text": "T", "thought": True}), chunk(SIGNED)], tools=[TOOL], thinking={"type": "adaptive", "display": "omitted"})
        self.assertEqual((message["content"][0]["thinking"], message["content"][0]["signature"]), ("", proxy.CALL_MARK + SIGNATURE))

    def test_signatures_are_remembered_and_carried(self):
        message, remembered = emitted([chunk({"text": "T", "thought": True}, SIGNED, BASH), chunk("bye", {"text": "", "thoughtSignature": "dGV4dA=="})], tools=[TOOL], **THINK)
        thinking, first, second, _ = message["content"]
        self.assertEqual(thinking["signature"], proxy.CALL_MARK + SIGNATURE)
        self.assertEqual(remembered, {first["id"]: SIGNATURE, proxy.text_key("bye", proxy.short_hash("hi")): "dGV4dA=="})
        self.assertNotEqual(first["id"], second["id"])

    def test_one_call_where_parallel_ones_are_not_wanted(self):
        message, _ = emitted([chunk(BASH, BASH)], tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        self.assertEqual(summary(message), [USED])

    def test_usage_is_the_last_of_each_count(self):
        chunks = [chunk("a", usage={"promptTokenCount": 50, "thoughtsTokenCount": 3}),
                  chunk("b", usage={"promptTokenCount": 60, "candidatesTokenCount": 7, "cachedContentTokenCount": 20, "toolUsePromptTokenCount": 5})]
        usage = emitted(chunks)[0]["usage"]
        self.assertEqual((usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"], usage["output_tokens_details"]),
                         (45, 20, 10, {"thinking_tokens": 3}))
        self.assertEqual(emitted([chunk("a")])[0]["usage"]["output_tokens"], 0)

    def test_citations_and_searches_are_counted(self):
        message, _ = emitted([chunk("It.", finish="STOP", groundingMetadata=GROUNDING)])
        self.assertEqual([c["url"] for c in message["content"][0]["citations"]], ["https://a.org", "https://b.org"])
        self.assertEqual(message["usage"]["server_tool_use"]["web_search_requests"], 2)
        self.assertEqual(message["content"][1]["id"], message["content"][2]["tool_use_id"])

    def test_the_json_answer_is_what_a_client_builds_from_the_events(self):
        for name, chunks, _, _ in RESPONSE_CASES:
            with self.subTest(name):
                events = list(proxy.events_from_gemini(chunks, proxy.MessageEmitter("m", lambda p: p + "1", lambda k, s: None)))
                whole = proxy.message_from_events(events)
                self.assertEqual(summary(whole), summary(check_grammar(events)))
                self.assertTrue(all(b.get("citations") is not None for b in whole["content"] if b["type"] == "text"))
                self.assertTrue(all(b["caller"] == {"type": "direct"} for b in whole["content"] if b["type"] == "tool_use"))

    def test_keep_alive_changes_nothing(self):
        emitter = proxy.MessageEmitter("m", lambda p: p + "1", lambda k, s: None)
        steps = [emitter.start(), emitter.keep_alive(), emitter.feed([chunk({"text": "T", "thought": True})]), emitter.keep_alive(),
                 emitter.feed([chunk("a")]), emitter.keep_alive(), emitter.feed([chunk(BASH)]), emitter.keep_alive(), emitter.finish()]
        self.assertEqual(summary(check_grammar(sum(steps, []))), [("thinking", "T"), ("text", "a"), USED])


# ---- 8. Errors and wire formats ----------------------------------------------------------------------------
def quota(id_, **more):
    return error_body(429, "You exceeded your current quota.\nPlease retry in 20.04466179s.", "RESOURCE_EXHAUSTED",
                      details=[{"violations": [dict({"quotaId": id_}, **more)]}, {"retryDelay": "20s"}])


ERROR_CASES = (  # upstream status, body, status, type, how the message starts, headers
    (400, BAD_KEY, 403, "permission_error", "The upstream refused the key: API key not valid.", {"x-should-retry": "false"}),
    (403, NO_KEY, 403, "permission_error", "The upstream refused the key: Method doesn't", {"x-should-retry": "false"}),
    (404, not_found("gemini-x", "generateContent"), 404, "not_found_error", "model: gemini-x", {}),
    (400, error_body(400, "The input token count (1200293) exceeds the maximum number of tokens allowed (1048576)."), 400, "invalid_request_error",
     "prompt is too long: 1200293 tokens > 1048576 maximum", {}),
    (400, error_body(400, "The input token count exceeds the maximum number of tokens allowed 1048576."), 400, "invalid_request_error",
     "prompt is too long: 1048577 tokens > 1048576 maximum", {}),
    (429, quota("GenerateRequestsPerMinutePerProjectPerModel-FreeTier"), 429, "rate_limit_error", "Gemini's rate limit: ", {"retry-after": "20"}),
    (429, quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier"), 429, "rate_limit_error", "The daily quota", {"x-should-retry": "false"}),
    (429, quota("PerMinute", quotaValue="0"), 429, "rate_limit_error", "This key's plan", {"x-should-retry": "false"}),
    (429, error_body(429, "Resource has been exhausted (e.g. check quota)."), 429, "rate_limit_error", "Gemini's rate limit: ", {"retry-after": "10"}),
    (503, [error_body(503, "The model is overloaded.")], 529, "overloaded_error", "Gemini is overloaded: The model is overloaded.", {}),
    (500, b"<html><style>x</style><h1>Server Error</h1></html>", 500, "api_error", "Gemini answered 500: Server Error", {}),
    (504, error_body(504, "Deadline"), 504, "timeout_error", "Gemini did not answer in time", {}),
    (400, error_body(400, "Unable to process input image."), 400, "invalid_request_error", "could not process image: ", {}),
    (403, error_body(403, "Consumer 'api_key:AIza%s' has been suspended." % ("x" * 35)), 403, "permission_error", "The upstream refused the key: Consumer 'api_key:[key]' has", {"x-should-retry": "false"}),
    (429, quota("PerDay", quotaValue="0"), 429, "rate_limit_error", "This key's plan", {"x-should-retry": "false"}),
    (429, error_body(429, "Quota exceeded, limit: 0\nPlease retry in 26.1s."), 429, "rate_limit_error", "This key's plan", {"x-should-retry": "false"}),
    (500, b"<p>" + b"x" * 380 + b" AIza" + b"k" * 35, 500, "api_error", "Gemini answered 500: " + "x" * 380, {}),
    (400, error_body(400, "x", details=5), 400, "invalid_request_error", "Gemini answered 400: x", {}),
    (400, b"", 400, "invalid_request_error", "Gemini answered 400: no reason given", {}),
)


class Wire(unittest.TestCase):

    def test_upstream_errors_are_told_as_clients_understand_them(self):
        for status, body, expected, type_, message, headers in ERROR_CASES:
            with self.subTest(message):
                error = proxy.upstream_error(status, body if isinstance(body, bytes) else json.dumps(body).encode(), "gemini-x")
                self.assertEqual((error.status, error.type, error.headers()), (expected, type_, headers))
                self.assertTrue(error.message.startswith(message), error.message)
                self.assertNotIn("\n", error.message)
                self.assertNotIn("AIza", error.message)

    def test_sse_comes_through_however_it_is_cut(self):
        records = [{"a": "ü\r\n\n"}, {"b": [1, 2]}, {"error": {"code": 503}}]
        data = ": comment\r\n" + "data: %s\r\n\r\n" % json.dumps(records[0], ensure_ascii=False) + 'data: {"b":\ndata: [1, 2]}\n\n' \
            + json.dumps(records[2], indent=2)
        data = data.encode()
        for size in range(1, 40):
            pieces = [data[i:i + size] for i in range(0, len(data), size)]
            self.assertEqual(sum(proxy.batches_from_sse(pieces), []), records)
        self.assertEqual(list(proxy.batches_from_sse([b'[{"a": 1}\n,\n{"b": 2}]'])), [[{"a": 1}, {"b": 2}]])
        with self.assertRaises(ValueError):
            list(proxy.batches_from_sse([b"data: {nonsense\n\n"]))

    def test_chunked_bodies_come_through_however_they_are_cut(self):
        data = b"".join(b"%x;x=1\r\n%s\r\n" % (n, b"a" * n) for n in (1, 20, 300)) + b"0\r\nTrailer: x\r\n\r\n"
        for size in range(1, 60):
            pieces = [data[i:i + size] for i in range(0, len(data), size)] + [b""]
            self.assertEqual(b"".join(proxy.unchunked(lambda: pieces.pop(0))), b"a" * 321)
        for broken in (data[:100], data[:-1], b"zz\r\n", b"5\r\nabc"):
            pieces = [broken, b""]
            with self.assertRaises(http.client.HTTPException):
                list(proxy.unchunked(lambda: pieces.pop(0)))

    def test_heads_are_read_in_one_way_or_not_at_all(self):
        for head, expected in ((b"A: 1\r\nb:2\t\r\nA:  3 \r\nC:\r\n\r\nbody", {"a": "1, 3", "b": "2", "c": ""}), (b"A: \xfc\n\n", {"a": "\xfc"}), (b"\r\n", {}), (b"", ValueError),
                               (b"a: 1", ValueError), (b"a: 1\r\n", ValueError), (b"a: %s\r\n\r\n" % (b"x" * 70000), ValueError), (b"a: 1\r\n" * 9000, ValueError),
                               (b"a : 1\r\n\r\n", None), (b"a: 1\r\n 2\r\n\r\n", None), (b"a\r\n\r\n", None), (b"a: 1\r2\r\n\r\n", None), (b"a: \0\r\n\r\n", None),
                               (b": 1\r\n\r\n", None), (b"Host: a\r\nhost: a\r\n\r\n", None), (b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", None)):
            with self.subTest(head[:40]):
                file = io.BytesIO(head)
                if isinstance(expected, dict):
                    self.assertEqual(proxy.parse_headers(proxy.read_head(file)), expected)
                    continue
                with self.assertRaises(ValueError):
                    proxy.parse_headers(proxy.read_head(file))
                if expected is None:  # an upstream is believed what can be read of it
                    self.assertIsInstance(proxy.parse_headers(proxy.read_head(io.BytesIO(head)), strict=False), dict)

    def test_upstream_answers_of_every_framing_are_read(self):
        def reply(data):
            ours, theirs = socket.socketpair()
            with theirs:
                theirs.sendall(data)
            kept = []
            exchange = proxy.Exchange({}, [proxy.Route("gemini", "")])
            connection = types.SimpleNamespace(sock=ours, close=ours.close)
            with contextlib.closing(ours):
                found = proxy.Response(connection, exchange, kept.append)
                return found.status, found.read(), bool(kept)
        ok, early = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        for data, expected in ((ok + b"Content-Length: 2\r\n\r\nab", (200, b"ab", True)), (early + ok + b"content-length:2\r\n\r\nab", (200, b"ab", True)),
                               (ok + b"Transfer-Encoding: Chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n", (200, b"ab", True)), (ok + b"\r\nab", (200, b"ab", False)),
                               (ok + b"Connection: Close\r\nContent-Length: 2\r\n\r\nab", (200, b"ab", False)), (b"HTTP/1.0 404 x\r\nContent-Length: 2\r\n\r\nab", (404, b"ab", False)),
                               (b"HTTP/1.1 204 x\r\n\r\n", (204, b"", True)), (ok + b"Content-Length: 3\r\n\r\nab", http.client.IncompleteRead),
                               (b"", http.client.RemoteDisconnected), (b"SSH-2.0\r\n\r\n", http.client.BadStatusLine), (b"HTTP/1.1 2", http.client.HTTPException)):
            with self.subTest(data):
                if isinstance(expected, tuple):
                    self.assertEqual(reply(data), expected)
                else:
                    with self.assertRaises(expected):
                        reply(data)

    def test_json_is_read_as_the_rfc_has_it(self):
        for raw, expected in ((rb'"\ud83d"', "\ufffd"), (rb'"\ud83d\ude00"', "\U0001f600"), (rb'"\\ud83d"', "\\ud83d"), (rb'"\ude00\ud83d"', "\ufffd\ufffd"),
                              ('"ü"'.encode(), "ü")):
            self.assertEqual(proxy.parse_json(raw), expected)
        for raw in (b"", b"{", b"NaN", b'{"a": Infinity}', b'"\xff"', b"[" * 200000, b'{"a": 1} x'):
            with self.assertRaises(proxy.ProxyError):
                proxy.parse_json(raw)
        with self.assertRaises(proxy.ProxyError):
            proxy.dump_json(proxy.parse_json(b"[1e999]"))


# ---- 9. Fuzz -----------------------------------------------------------------------------------------------
KEYS = ("type text content role messages tools name id input thinking signature source data media_type url tool_use_id input_schema properties items anyOf"
        " enum required $ref allOf oneOf const type additionalProperties candidates parts functionCall args thought thoughtSignature finishReason"
        " usageMetadata groundingMetadata groundingChunks web promptFeedback blockReason executableCode inlineData codeExecutionResult output_config"
        " effort format schema tool_choice system stop_sequences model max_tokens cache_control tool_name tool definition budget_tokens index").split()
VALUES = ("text", "user", "assistant", "system", "tool_use", "tool_result", "thinking", "image", "document", "base64", "url", "string", "object", "array",
          "tool_reference", "tool_addition", "compaction", "search_result", "any", "tool", "adaptive", "enabled", "json_schema", "#", "#/a", "web_search_1", "bash_1",
          "", "ü", "\ud800", "STOP", "SAFETY", SIGNATURE, proxy.CALL_MARK + SIGNATURE, 0, 1, -1, 2.5, 1e308, 10 ** 30, True, False, None)


def junk(rng, depth=4):
    """Arbitrary JSON, with a taste for the words of both APIs."""
    kind = rng.randrange(6) if depth else 0
    if kind < 3:
        return rng.choice(VALUES)
    if kind == 3:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): junk(rng, depth - 1) for _ in range(rng.randrange(5))}


def mutated(rng, value, rate):
    """A valid value with some of its nodes replaced by junk, or gone."""
    if rng.random() < rate:
        return junk(rng, 2)
    if isinstance(value, dict):
        return {k: mutated(rng, v, rate) for k, v in value.items() if rng.random() > rate / 2}
    return [mutated(rng, v, rate) for v in value] if isinstance(value, list) else value


class Fuzz(unittest.TestCase):
    """SEED=n CASES=n python3 test_proxy.py Fuzz repeats or prolongs a run."""

    def attempt(self, case, act):
        try:
            return act()
        except proxy.ProxyError:
            return None
        except Exception as exc:
            raise AssertionError("SEED=%d: %s: %r on %s" % (SEED, type(exc).__name__, exc, json.dumps(case)[:2000])) from exc

    def test_any_request_is_taken_or_refused(self):
        rng = random.Random(SEED)
        seeds = [case[1] for case in REQUEST_CASES]
        for i in range(CASES):
            case = mutated(rng, rng.choice(seeds), 0.08) if i % 3 else junk(rng)
            case = dict(case, model="m") if isinstance(case, dict) else case
            gemini_model = rng.choice(MODELS)
            translation = self.attempt(case, lambda: proxy.to_gemini(proxy.check_request(case), gemini_model, CONFIG))
            if translation:
                body = json.loads(self.attempt(case, lambda: proxy.dump_json(translation.body)) or b"null")
                problem = refusal(body, gemini_model) if body else None
                self.assertIsNone(problem, "SEED=%d %s" % (SEED, json.dumps(case)[:2000]))

    def test_any_schema_is_cleaned(self):
        rng = random.Random(SEED + 1)
        seeds = [case[1] for case in SCHEMA_CASES]
        for i in range(CASES):
            case = mutated(rng, rng.choice(seeds), 0.2) if i % 2 else junk(rng, 6)
            schema = self.attempt(case, lambda: proxy.to_gemini_schema(case, root=True))
            body = {"contents": [user("x")], "tools": [{"functionDeclarations": [{"name": "t", "parametersJsonSchema": schema}]}]}
            self.assertIsNone(refusal(body, "gemini-3.8-flash"), "SEED=%d %s" % (SEED, json.dumps(case)[:2000]))
            self.assertIsNone(refusal(proxy.with_strict_tools(body), "gemini-3.8-flash"), "SEED=%d %s" % (SEED, json.dumps(case)[:2000]))

    def test_any_answer_keeps_the_grammar(self):
        rng = random.Random(SEED + 2)
        for i in range(CASES):
            chunks = [mutated(rng, c, 0.06) if i % 3 else junk(rng, 5) for c in rng.choice(RESPONSE_CASES)[1]]
            fields = dict(THINK) if i % 2 else {}
            self.attempt(chunks, lambda: emitted(chunks, tools=[TOOL], **fields))


# ---- 10. State ---------------------------------------------------------------------------------------------
class State(unittest.TestCase):

    def test_the_cache_drops_the_least_recently_used(self):
        now = [0.0]
        cache = proxy.SignatureCache(2, 10, 1 << 20, lambda: now[0])
        cache.put("a", "1"), cache.put("b", "2")
        self.assertEqual(cache.get("a"), "1")
        cache.put("c", "3")
        self.assertEqual([cache.get(k) for k in "abc"], ["1", None, "3"])
        now[0] = 9
        self.assertEqual(cache.get("a"), "1")  # use renews
        now[0] = 15
        self.assertEqual((cache.get("a"), cache.get("c")), ("1", None))

    def test_the_cache_is_bound_in_bytes(self):
        cache = proxy.SignatureCache(1000, 10, 5000)
        for i in range(100):
            cache.put("k%d" % i, "x" * 700)
            self.assertLessEqual(cache.size()[1], 5000)
        self.assertEqual(cache.get("k99"), "x" * 700)
        self.assertIsNone(cache.get("k0"))

    def test_eight_threads_leave_the_cache_whole(self):
        cache = proxy.SignatureCache(500, 10, 1 << 20)

        def hammer(n):
            rng = random.Random(n)
            for i in range(3000):
                cache.put("k%d" % rng.randrange(2000), "s" * rng.randrange(50))
                cache.get("k%d" % rng.randrange(2000))

        threads = [threading.Thread(target=hammer, args=(n,)) for n in range(8)]
        [t.start() for t in threads], [t.join() for t in threads]
        entries = cache._entries
        self.assertEqual(cache.size(), (500, sum(len(k) + len(v[0]) + cache.ENTRY_BYTES for k, v in entries.items())))

    def test_tools_are_remembered_by_content_alone(self):
        declarations = proxy.DeclarationCache()
        variants = [dict(TOOL, input_schema={"type": "object", "properties": {"a": {"default": value}}}) for value in (1, True, 1.0, "1", None)]
        for _ in range(2):
            for tools in [[v] for v in variants] + [variants[:2], variants[::-1], []]:
                tools = [dict(t, name="t%d" % i) for i, t in enumerate(tools)]
                plain = proxy.to_gemini(request(tools=tools), "gemini-3.8-flash", CONFIG).body
                body = proxy.to_gemini(request(tools=copy.deepcopy(tools)), "gemini-3.8-flash", CONFIG, declare=declarations.declare).body
                self.assertEqual(json.loads(proxy.dump_request(body)), json.loads(proxy.dump_json(plain)))
                self.assertIn(json.dumps(plain.get("tools", {}), separators=(",", ":")).encode(), proxy.dump_request(body) + b"{}")

    def test_prices_are_those_of_the_day_and_the_prompt(self):
        usage = {"promptTokenCount": 100000, "cachedContentTokenCount": 40000, "candidatesTokenCount": 1000, "thoughtsTokenCount": 500, "toolUsePromptTokenCount": 100}
        own = dict(prices=proxy.load_config({}, {"PRICES": "llama*=1/2,x=1/2/0"}).prices)
        for model, day, changes, settings, expected in (
                ("gemini-3.8-flash", "2026-12-31", {}, {}, 0.75 * 0.0601 + 0.075 * 0.04 + 3.75 * 0.0015), ("gemini-3.8-flash", "2027-01-01", {}, {}, 1.5 * 0.0601 + 0.15 * 0.04 + 7.5 * 0.0015),
                ("gemini-3.1-pro-preview-customtools", "2026-11-21", {"promptTokenCount": 200000}, {}, 2 * 0.1601 + 0.2 * 0.04 + 12 * 0.0015),
                ("gemini-3.1-pro-preview", "2026-11-21", {"promptTokenCount": 200001}, {}, 4 * 0.160101 + 0.4 * 0.04 + 18 * 0.0015),
                ("gemini-3.8-flash-image", "2026-11-21", {}, {}, None), ("llama-4", "2026-11-21", {}, own, 0.1001 + 0.003), ("x", "2026-11-21", {}, own, 0.0601 + 0.003),
                ("unknown", "2026-11-21", {"cost": 0.5}, {}, 0.5), ("gemini-3.8-flash", "2026-11-21", {"promptTokenCount": "many", "cachedContentTokenCount": None}, {}, 0.75 * 0.0001 + 3.75 * 0.0015)):
            with self.subTest(model):
                cost = proxy.cost_of(dict(usage, **changes), proxy.Route("gemini", model), proxy.Config(**settings), day)
                self.assertAlmostEqual(cost or -1, expected or -1, msg=changes)
        self.assertEqual(proxy.load_config({}, {"PRICES": '{"a": [1, 2, 0.5]}'}).prices, (("a", "", 0, 1.0, 2.0, 0.5),))
        for value in ("x", "x=1", "x=a/b", "x=1/2/3/4", "=1/2", "x=-1/2", '{"x": 5}', '{"x": [1, null]}', "{"):
            with self.assertRaisesRegex(ValueError, "PRICES", msg=value):
                proxy.load_config({}, {"PRICES": value})

    def test_the_last_hour_is_summed_by_minutes(self):
        now = [10000.0]
        traffic = proxy.Traffic(lambda: now[0])
        record = {"status": 200, "requested": "a", "model": "m", "input": 10, "cached": 5, "output": 2, "thought": 1, "cost": 0.5, "first_ms": 3, "total_ms": 4}
        for minute in (0, 1, 1, 1, 59, 60.5):
            now[0] = 10000 + minute * 60
            traffic.add(dict(record, first_ms=3 + minute), "s")
        traffic.add({"status": 401, "requested": "/v1/messages"})
        hour = traffic.last_hour()
        self.assertEqual([(59 - i, m["requests"], m["errors"], m["input"], m["cost"], m["first_ms"]) for i, m in enumerate(hour["minutes"]) if m["requests"]],
                         [(59, 3, 0, 30, 1.5, 4), (1, 1, 0, 10, 0.5, 62), (0, 2, 1, 10, 0.5, 63.5)])
        self.assertEqual([r["status"] for r in hour["recent"]], [401] + [200] * 5)
        self.assertEqual((traffic.spent, traffic.session("s"), traffic.session("t")),
                         (3.0, {"requests": 6, "input": 60, "cached": 30, "output": 12, "thought": 6, "cost": 3.0, "model": "m", "largest": 10}, None))
        self.assertEqual(proxy.status_line(dict(traffic.session("s"), input=61234)), "m · 61.2k in (30 cached), 18 out · $3.000")

    def test_keys_take_turns_and_rest_by_model(self):
        now = [0.0]
        ring = proxy.KeyRing(["a", "b", "c"], lambda: now[0])
        self.assertEqual([ring.acquire("m") for _ in range(4)], [0, 1, 2, 0])
        self.assertTrue(ring.cool_down(1, "m", 5))
        self.assertEqual([ring.acquire("m") for _ in range(3)], [2, 0, 2])
        self.assertEqual(ring.acquire("other"), 0)
        self.assertEqual([ring.cool_down(n, "m", 60) for n in (0, 2)], [True, False])
        self.assertEqual(ring.acquire("m"), 1)
        now[0] = 61
        self.assertEqual(sorted(ring.acquire("m") for _ in range(3)), [0, 1, 2])


# ---- 11. End to end ----------------------------------------------------------------------------------------
def loop_script(fake_of):
    """A model that thinks, makes two calls, and then says what came back."""
    def script(body, model_, path):
        fake = fake_of()
        answers = [p["functionResponse"]["response"] for p in body["contents"][-1]["parts"] if "functionResponse" in p]
        if answers:
            return fake.says("Got ", json.dumps(answers))
        return fake.calls(("Bash", {"command": "ls"}), ("Bash", {"command": "pwd"}), thought="I look.")
    return script


class EndToEnd(unittest.TestCase):

    def run_proxy(self, script=repeat, **settings):
        running = Running(script, **settings)
        self.addCleanup(running.__exit__)
        return running

    def loop(self, **settings):
        running = self.run_proxy(lambda *args: script(*args), **settings)
        script = loop_script(lambda: running.fake)
        return running

    def test_a_tool_loop_in_every_delivery(self):
        shapes = {}
        for mode, stream in (("live", True), ("replay", True), ("live", False)):
            with self.subTest(mode, stream=stream):
                r = self.loop(stream_mode=mode)
                body = request("go", tools=[TOOL], stream=stream, **THINK)
                status, answer = r.ask(body)
                self.assertEqual(status, 200)
                first = check_grammar(answer) if stream else answer
                uses_ = [b for b in first["content"] if b["type"] == "tool_use"]
                self.assertEqual([b["input"]["command"] for b in uses_], ["ls", "pwd"])
                body["messages"] += [{"role": "assistant", "content": first["content"]}, results(*[b["id"] for b in reversed(uses_)])]
                second = r.ask(body)[1]
                second = check_grammar(second) if stream else second
                self.assertEqual(second["stop_reason"], "end_turn")
                self.assertEqual((r.fake.refusals, r.fake.dummies, r.fake.unreturned()), ([], 0, []))
                shapes[mode, stream] = [summary(first), first["stop_reason"], first["usage"], [b["type"] for b in second["content"]]]
        self.assertEqual(len({json.dumps(s) for s in shapes.values()}), 1, shapes)

    def test_signatures_survive_a_restart(self):
        r = self.loop()
        body = request("go", tools=[TOOL], **THINK)
        first = r.ask(body)[1]
        with Running(r.fake.script, gemini_api_base=r.fake.url) as other:
            uses_ = [b["id"] for b in first["content"] if b["type"] == "tool_use"]
            body["messages"] += [{"role": "assistant", "content": first["content"]}, results(*uses_)]
            self.assertEqual(other.ask(body)[0], 200)
            self.assertIn(b'signatures_total{kind="from_client"} 1', other.send("GET", "/metrics")[2])
        self.assertEqual((r.fake.refusals, r.fake.dummies, r.fake.unreturned()), ([], 0, []))

    def test_without_a_stream_endpoint_whole_answers_are_replayed_and_that_is_remembered(self):
        for refusal_ in ((404, {}, b"<html>nothing here"), (405, {}, b""), (501, {}, b"{}"), (200, {}, json.dumps([chunk("plain", finish="STOP")]).encode())):
            with self.subTest(refusal_[0]):
                r = self.run_proxy(lambda body, m, path: refusal_ if "stream" in path else chunk("plain", finish="STOP"))
                for _ in range(2):
                    self.assertEqual(summary(check_grammar(r.ask(request(stream=True))[1])), [("text", "plain")])
                self.assertEqual(sum("stream" in q["path"] for q in r.fake.requests), 1)

    def test_an_empty_or_malformed_answer_is_asked_for_again(self):
        for bad in (chunk("", finish="STOP"), chunk(finish="MALFORMED_FUNCTION_CALL"), chunk({"text": "hm", "thought": True}, finish="UNEXPECTED_TOOL_CALL"), {}):
            for stream in (True, False):
                r = self.run_proxy([[bad], [chunk("ok", finish="STOP")]])
                status, answer = r.ask(request(stream=stream, **THINK))
                message = check_grammar(answer) if stream else answer
                self.assertEqual((status, summary(message)[-1]), (200, ("text", "ok")), bad)
        r = self.run_proxy(lambda *args: [bad])
        self.assertEqual(summary(r.ask(request())[1]), [("text", "[The model gave an empty answer.]")])
        self.assertEqual(len(r.fake.requests), 3)

    def test_known_repairs_of_a_400_are_made_once(self):
        for name, text, gone in (("thinking", "Thinking level LOW is not supported for this model.", lambda b: "thinkingConfig" not in b["generationConfig"]),
                                 ("schema", "Invalid JSON payload received. Unknown name \"parametersJsonSchema\" at 'tools[0]': Cannot find field.",
                                  lambda b: "parameters" in b["tools"][0]["functionDeclarations"][0]),
                                 ("signature", "Invalid thought signature.", lambda b: b["contents"][1]["parts"][0]["thoughtSignature"] == DUMMY)):
            with self.subTest(name):
                r = self.run_proxy(lambda body, m, path: [chunk("ok", finish="STOP")] if gone(body) else error_body(400, text))
                body = request("x", says(CARRIED, uses()), results("toolu_1"), tools=[TOOL])
                r.fake.issued[SIGNATURE] = ("Bash", {"command": "ls"})
                self.assertEqual(summary(r.ask(body)[1]), [("text", "ok")])
                self.assertEqual(len(r.fake.requests), 2)
                r.ask(body)
                self.assertEqual(len(r.fake.requests), 3 if name == "schema" else 4)  # a missing field is remembered
                self.assertEqual(r.fake.refusals, [])

    def test_early_failures_are_http_errors(self):
        for reply, status, type_ in ((BAD_KEY, 403, "permission_error"), (error_body(400, "Bad thing."), 400, "invalid_request_error"),
                                     (quota("PerDay"), 429, "rate_limit_error"), ([{"error": {"code": 400, "message": "Bad."}}], 400, "invalid_request_error"),
                                     ([b'data: {"error": {"code": 403, "message": "Leaked."}}\r\n\r\n'], 403, "permission_error")):
            for stream in (True, False) if isinstance(reply, dict) else (True,):
                with self.subTest(type_, stream=stream):
                    r = self.run_proxy(lambda *args: reply)
                    got, answer = r.ask(request(stream=stream))
                    self.assertEqual((got, answer["type"], answer["error"]["type"]), (status, "error", type_))
                    self.assertTrue(answer["request_id"].startswith("req_"))
                    self.assertEqual(len(r.fake.requests), 1)

    def test_unknown_model(self):
        r = self.run_proxy()
        status, answer = r.ask(request(model="gemini-unheard-of", stream=True))
        self.assertEqual((status, answer["error"]), (404, {"type": "not_found_error", "message": "model: gemini-unheard-of"}))

    def test_late_failures_end_in_an_error_event(self):
        for end in ("cut", "reset", b'{\n "error": {\n  "code": 503, "message": "Overloaded."}\n}', {"error": {"code": 500, "message": "Fault."}}):
            with self.subTest(end):
                r = self.run_proxy(lambda *args: [chunk("Hello"), 0.05, end])
                status, events = r.ask(request(stream=True))
                self.assertEqual((status, events[0]["type"], events[-1]["type"]), (200, "message_start", "error"))
                self.assertNotIn("message_stop", [e["type"] for e in events])

    def test_silence_gets_pings_and_the_200_waits_for_the_first_chunk(self):
        r = self.run_proxy(lambda *args: [0.3, chunk("a"), 0.3, chunk("b", finish="STOP")], ping_interval=0.07)
        _, events = r.ask(request(stream=True))
        kinds = [e["type"] for e in events]
        self.assertEqual(kinds[:2], ["message_start", "ping"])
        self.assertGreater(kinds[kinds.index("content_block_delta"):].count("ping"), 1)
        self.assertEqual(kinds[-1], "message_stop")
        check_grammar(events)
        r = self.run_proxy(lambda *args: [0.2, error_body(400, "Late.")], ping_interval=5)
        self.assertEqual(r.ask(request(stream=True))[0], 400)

    def test_a_silent_thinking_stream_gets_empty_thoughts(self):
        saved = proxy.EventStream.THINKING_SECONDS
        self.addCleanup(setattr, proxy.EventStream, "THINKING_SECONDS", saved)
        proxy.EventStream.THINKING_SECONDS = 0.06
        for fields, expected in ((THINK, [("thinking", "hm"), ("text", "a")]), ({}, [("text", "a")])):
            r = self.run_proxy(lambda *args: [0.25, chunk({"text": "hm", "thought": True}), 0.25, chunk("a", finish="STOP")], ping_interval=0.06)
            _, events = r.ask(request(stream=True, **fields))
            self.assertEqual(summary(check_grammar(events)), expected)
            empty = [e for e in events if e.get("delta", {}).get("thinking") == ""]
            self.assertEqual(bool(empty), bool(fields))

    def test_upstream_silence_is_an_error_while_pings_go_on(self):
        r = self.run_proxy(lambda *args: [chunk("a"), "hang"], ping_interval=0.1, request_timeout=0.4)
        _, events = r.ask(request(stream=True))
        self.assertEqual((events[-1]["type"], events[-1]["error"]["type"]), ("error", "timeout_error"))
        self.assertIn("ping", [e["type"] for e in events])
        r = self.run_proxy(lambda *args: ["hang"], request_timeout=0.3)
        self.assertEqual(r.ask(request())[0], 504)
        self.assertEqual(len(r.fake.requests), 1)

    def test_tokens(self):
        r = self.run_proxy(proxy_auth_token="secret")
        for headers, status in (({}, 401), ({"x_api_key": "wrong"}, 401), ({"x_api_key": "secret"}, 200), ({"authorization": "Bearer secret"}, 200),
                                ({"x_api_key": "wrong", "authorization": "Bearer secret"}, 200), ({"authorization": "secret"}, 401)):
            self.assertEqual(r.ask(request(), **headers)[0], status, headers)
        for path in ("/", "/metrics", "/v1/models", "/test-connection"):
            self.assertEqual(r.send("GET", path)[0], 401, path)
        status, headers, page = r.send("GET", "/", accept="text/html,*/*")  # it shows nothing before its script has the token
        self.assertEqual((status, headers["content-type"], b"secret" in page), (200, "text/html; charset=utf-8", False))
        self.assertIn("default-src 'none'", headers["content-security-policy"])
        self.assertEqual(set(re.findall(rb"https?://[^/\"']+|//[\w-]+\.\w+|@import|innerHTML|url[(]", page)), set())
        self.assertEqual((r.send("GET", "/health")[0], r.send("HEAD", "/")[0]), (200, 200))
        self.assertEqual(r.send("GET", "/", x_api_key="wrong")[1]["x-should-retry"], "false")

    def test_client_keys(self):
        r = self.run_proxy(client_keys=True, gemini_api_key="")
        self.assertEqual(r.ask(request())[0], 401)
        self.assertEqual(r.ask(request(), x_api_key="own")[0], 200)
        self.assertEqual(r.fake.requests[-1]["headers"]["x-goog-api-key"], "own")

    def test_endpoints(self):
        r = self.run_proxy()
        for method, path, status in (("GET", "/health", 200), ("GET", "/", 200), ("GET", "/metrics", 200), ("GET", "/v1/models?limit=1000", 200),
                                     ("GET", "/v1/models/claude-gemini-3.8-flash", 200), ("GET", "/v1/models/claude-opus-5%5B1m%5D", 200), ("GET", "/v1/models/gemini-9-nope", 404), ("HEAD", "/", 200),
                                     ("HEAD", "/api/hello", 200), ("GET", "/api/hello", 200), ("GET", "//health", 200), ("GET", "/v1/messages", 405), ("PUT", "/v1/messages", 405),
                                     ("GET", "/nothing", 404), ("GET", "/test-connection", 200), ("TRACE", "/", 405)):
            got, headers, data = r.send(method, path)
            self.assertEqual(got, status, (method, path, data))
            if method == "HEAD":
                self.assertEqual(data, b"")
            elif status >= 400:
                self.assertEqual(json.loads(data)["type"], "error")
        self.assertEqual(r.send("POST", "/api/event_logging/batch", {})[0], 200)
        self.assertGreater(json.loads(r.send("POST", "/v1/messages/count_tokens?beta=true", request("x" * 400))[2])["input_tokens"], 90)
        page = json.loads(r.send("GET", "/v1/models?limit=2")[2])
        self.assertTrue(page["has_more"])
        rest = json.loads(r.send("GET", "/v1/models?limit=1000&after_id=" + page["last_id"])[2])
        self.assertEqual(len({m["id"] for m in page["data"] + rest["data"]}), 2 * len(MODELS))

    def test_tokens_are_counted_by_gemini_and_remembered(self):
        r = self.run_proxy()
        count = lambda body: json.loads(r.send("POST", "/v1/messages/count_tokens", body)[2])["input_tokens"]  # noqa: E731
        first = count(request("x" * 4000, system="s", tools=[TOOL]))
        self.assertEqual([first, count(request("x" * 4000, system="s", tools=[TOOL]))], [len(json.dumps(r.fake.requests[0]["body"])) // 4] * 2)
        self.assertEqual([(q["action"], q["body"]["generateContentRequest"]["model"]) for q in r.fake.requests], [("countTokens", "models/gemini-3.8-flash")])
        answers = at_once(26, lambda n: count(request("y%d" % n)))
        self.assertEqual(len(answers), 26)
        r = self.run_proxy(gemini_api_key="bad")
        self.assertGreater(count(request("x" * 4000)), 500)

    def test_estimates_learn_from_true_counts(self):
        counts = proxy.TokenCounts()
        translation = proxy.to_gemini(request(), "gemini-3.8-flash", CONFIG)
        for _ in range(30):
            counts.learn(counts.estimate(4000, translation), 1500)
        self.assertAlmostEqual(counts.estimate(4000, translation), 1500, delta=50)
        self.assertAlmostEqual(counts.estimate(8000, translation), 3000, delta=100)

    def test_models_are_what_the_key_can_use(self):
        r = self.run_proxy()
        for _ in range(3):
            listed = {m["id"]: m for m in json.loads(r.send("GET", "/v1/models?limit=1000")[2])["data"]}
        self.assertEqual(set(listed), set(MODELS) | {"claude-" + m for m in MODELS})
        self.assertEqual(listed["claude-gemini-2.5-flash"]["max_input_tokens"], 1048576)
        r = self.run_proxy(gemini_api_key="bad")
        listed = json.loads(r.send("GET", "/v1/models?limit=1000")[2])["data"]
        self.assertEqual(len(listed), 2 * len(proxy.LISTED_MODELS))

    def test_one_log_line_for_each_request(self):
        for as_json in (True, False):
            lines, handler = [], logging.Handler()
            handler.emit = lambda record: lines.append(proxy.LogLines(as_json, False).format(record))
            log = logging.getLogger("claude_gemini_proxy")
            log.addHandler(handler), log.setLevel(logging.INFO)
            self.addCleanup(lambda: (log.removeHandler(handler), log.setLevel(logging.CRITICAL)))
            self.run_proxy().ask(request(stream=True))
            self.assertTrue(wait_for(lambda: lines))
            self.assertEqual(len(lines), 1)
            if as_json:
                line = json.loads(lines[0])
                self.assertEqual((line["requested"], line["model"], line["finish"], line["key"], line["retries"]), ("claude-sonnet-5", "gemini-3.8-flash", "STOP", 1, 0))
                self.assertLessEqual(line["first_ms"], line["total_ms"])
            self.assertNotIn("\n", lines[0])
            log.removeHandler(handler)

    def test_the_page_has_what_it_shows(self):
        r = self.run_proxy()
        r.ask(request(stream=True), x_claude_code_session_id="one")
        r.ask(request(model="gemini-9-nope"))
        r.send("POST", "/v1/messages", b"{")
        self.assertTrue(wait_for(lambda: len(json.loads(r.send("GET", "/")[2])["recent"]) == 3))
        shown = json.loads(r.send("GET", "/?session=one")[2])
        self.assertEqual(sorted(x["status"] for x in shown["recent"]), [200, 400, 404])
        self.assertEqual(sum(m["errors"] for m in shown["minutes"]), 2)
        self.assertEqual((shown["keys"], shown["live"], shown["session"]["requests"]), ([{"number": 1, "cooldown": {}, "upstream": "gemini"}], [], 1))
        self.assertGreater(shown["spent_usd"], 0)
        self.assertAlmostEqual(shown["counters"]["cost_usd_total{model=gemini-3.8-flash}"], shown["spent_usd"])
        page = r.send("GET", "/", accept="text/html")[2].decode()
        for field in set(re.findall(r"\bd\.(\w+)", page)):
            self.assertIn(field, shown)
        for field in set(re.findall(r"\bx\.(\w+)", page)):
            self.assertTrue(any(field in record for record in shown["recent"]) or field in shown["minutes"][0] or field == "seconds", field)
        environment = {"ANTHROPIC_BASE_URL": r.server.url, "ANTHROPIC_AUTH_TOKEN": "x"}
        for given, environ, expected in (({"session_id": "one"}, environment, "gemini-3.8-flash · "), ({"session_id": "two", "model": {"display_name": "Opus"}}, environment, "Opus\n"),
                                         ({"model": {"display_name": "Opus"}}, {"ANTHROPIC_BASE_URL": "http://127.0.0.1:1"}, "Opus\n")):
            status, output = child(proxy.__file__, "statusline", input_=json.dumps(given), **environ)
            self.assertEqual((status, output[:len(expected)]), (0, expected))

    def test_a_budget_ends_with_a_clear_error(self):
        r = self.run_proxy(budget_usd=0.000001)
        self.assertEqual(r.ask(request())[0], 200)
        self.assertTrue(wait_for(lambda: r.server.traffic.spent))
        status, headers, data = r.send("POST", "/v1/messages", request())
        self.assertEqual((status, headers["x-should-retry"], json.loads(data)["error"]["type"]), (402, "false", "billing_error"))
        self.assertIn(b"BUDGET_USD=1e-06", data)
        r = self.run_proxy(budget_usd=5.0, fallback_models=("gemini-9-new",))
        self.assertIn("the price of gemini-9-new is not known: set PRICES", r.ask(request())[1]["error"]["message"])

    def test_long_requests_may_have_their_own_model(self):
        r = self.run_proxy(long_context_model="gemini-2.5-pro", long_context_tokens=1000)
        for model, size, expected in (("claude-opus-5", 100, "gemini-3.8-flash"), ("claude-opus-5", 9000, "gemini-2.5-pro"), ("gemini-3.6-flash", 9000, "gemini-3.6-flash")):
            r.ask(request("x" * size, model=model))
            self.assertEqual(r.fake.requests[-1]["model"], expected)
        for settings in ({"anthropic_model": "gemini-3.6-flash"}, {"model_map": "claude-*=gemini-3.6-flash"}):
            r = self.run_proxy(long_context_model="gemini-2.5-pro", long_context_tokens=10, **settings)
            r.ask(request("x" * 9000))
            self.assertEqual(r.fake.requests[-1]["model"], "gemini-3.6-flash")
        r = self.run_proxy(lambda *args: error_body(429, "Quota.", "RESOURCE_EXHAUSTED"), long_context_model="gemini-2.5-pro", long_context_tokens=10,
                           fallback_models="gemini-2.5-pro,gemini-3.6-flash, gemini-2.5-pro", max_retries=0)
        self.assertEqual((r.ask(request("x" * 9000))[0], [q["model"] for q in r.fake.requests]), (429, ["gemini-2.5-pro", "gemini-3.6-flash"]))

    def test_odd_counts_and_names_do_no_harm(self):
        odd = ({"promptTokenCount": 10 ** 400}, {"candidatesTokenCount": 10 ** 13}, {"cost": 10 ** 400}, {"cost": -5}, {"cost": True}, {"cost": "x"}, {"promptTokenCount": -1}, {"promptTokenCount": 0, "cachedContentTokenCount": 9},
               {"thoughtsTokenCount": [1]}, {"toolUsePromptTokenCount": 1.5})
        r = self.run_proxy(lambda *args: [chunk("ok", finish="STOP", usage=odd[len(r.fake.requests) % len(odd)])], budget_usd=1.0)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", r.port)) as connection:
            for i in range(2 * len(odd)):
                connection.request("POST", "/v1/messages", json.dumps(request(stream=bool(i % 2))))
                reply = connection.getresponse()
                self.assertEqual((reply.status, b"ok" in reply.read()), (200, True))
        self.assertTrue(0 <= r.server.traffic.spent < 0.001)
        r.ask(request(model="x" * 100000))
        for path, headers in (("/v1beta/models/x?key=AIzaNotToBeSeen", {}), ("/v1/messages", {"Origin": "http://evil"})):
            r.send("POST", path, request(), **headers)
        shown = r.send("GET", "/")[2]
        self.assertEqual((b"NotToBeSeen" in shown, len(shown) < 60000), (False, True))
        self.assertIn("/v1beta/models/x", [record["requested"] for record in json.loads(shown)["recent"]])

    def test_hints_name_what_is_missing(self):
        for settings, words in (({}, ["shows", "second key"]), ({"gemini_api_key": "a,b"}, ["shows"]), ({"fallback_models": ("gemini-2.5-pro",), "big_model": "gemini-x"}, ["shows", "no price is known for gemini-x"]),
                                ({"gemini_api_key": "", "client_keys": True}, ["shows"]), ({"gemini_api_key": "", "openai_api_base": "http://localhost:1"}, ["shows"])):
            found = proxy.hints(self.run_proxy(**dict({"gemini_api_base": proxy.GEMINI_BASE}, **settings)).server)
            self.assertEqual([word in hint for word, hint in zip(words, found)], [True] * len(found), found)
            self.assertEqual(len(words), len(found))

    def test_bodies(self):
        r = self.run_proxy(max_body_bytes=2000)
        body = json.dumps(request()).encode()
        head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n"
        chunked = b"%x;ext=1\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        for sent, status in ((b"Transfer-Encoding: chunked\r\n\r\n" + chunked, 200), (b"Content-Length: %d\r\n\r\n" % len(body) + body, 200),
                             (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked, 400), (b"Transfer-Encoding: gzip\r\n\r\n", 400),
                             (b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nxxxxxx", 400), (b"Content-Length: -5\r\n\r\n", 400), (b"Content-Length: x\r\n\r\n", 400),
                             (b"\r\n", 411), (b"Content-Length: 999999\r\n\r\n" + b"x" * 99999, 413), (b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
                             (b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n", 413), (b"Content-Length: 3\r\n\r\n{{{", 400), (b"Content-Length: 4\r\n\r\n\"\xff\xfe\"", 400),
                             (b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nxxx", 415), (b"X: " + b"y" * 70000 + b"\r\n\r\n", 413)):
            with self.subTest(sent[:60]):
                answer = r.raw(head + sent)
                self.assertTrue(answer.startswith(b"HTTP/1.1 %d " % status), answer[:200])
                self.assertNotIn(b"Traceback", answer)
                if status != 200:
                    self.assertEqual(json.loads(answer.partition(b"\r\n\r\n")[2])["type"], "error")

    def test_two_requests_on_one_connection(self):
        r = self.run_proxy()
        connection = http.client.HTTPConnection("127.0.0.1", r.port, timeout=10)
        for stream in (True, False, True):
            connection.request("POST", "/v1/messages", json.dumps(request(stream=stream)))
            self.assertIn(b"You said", connection.getresponse().read())
        connection.close()
        self.assertEqual(len(r.fake.requests), 3)

    def test_usage_is_that_of_the_answer_that_was_given(self):
        r = self.run_proxy([[chunk("", finish="STOP", usage={"promptTokenCount": 9, "cachedContentTokenCount": 5, "thoughtsTokenCount": 7})],
                            [chunk("ok", finish="STOP", usage={"promptTokenCount": 9, "candidatesTokenCount": 1})]])
        usage = r.ask(request())[1]["usage"]
        self.assertEqual((usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]), (9, 0, 1))

    def test_an_old_client_gets_a_stream_that_ends_with_the_connection(self):
        r = self.run_proxy()
        body = json.dumps(request(stream=True)).encode()
        answer = r.raw(b"POST /v1/messages HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head, _, data = answer.partition(b"\r\n\r\n")
        self.assertNotIn(b"chunked", head)
        check_grammar(events_of(data))

    def test_a_client_that_leaves_ends_the_upstream_request(self):
        r = self.run_proxy(lambda *args: [chunk("a"), "hang"], ping_interval=0.2)
        body = json.dumps(request(stream=True)).encode()
        with socket.create_connection(("127.0.0.1", r.port)) as sock:
            sock.sendall(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            self.assertIn(b"200 OK", sock.recv(100))
        deadline = time.monotonic() + 5
        while r.server.active and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertEqual(r.server.active, 0)

    def test_fallback_models_and_keys(self):
        def script(body, model_, path):
            return quota("PerDay") if model_ == "gemini-3.8-flash" else [chunk(model_, finish="STOP")]
        r = self.run_proxy(script, fallback_models=("gemini-3.6-flash", "gemini-2.5-pro"), gemini_api_key="k1,k2")
        self.assertEqual(summary(r.ask(request())[1]), [("text", "gemini-3.6-flash")])
        self.assertEqual([q["headers"]["x-goog-api-key"] for q in r.fake.requests][:2], ["k1", "k2"])
        self.assertEqual(r.fake.refusals, [])

    def test_passing_faults_are_retried(self):
        r = self.run_proxy([error_body(503, "Overloaded.", "UNAVAILABLE"), ["reset"], [chunk("ok", finish="STOP")]])
        self.assertEqual(summary(check_grammar(r.ask(request(stream=True))[1])), [("text", "ok")])
        r = self.run_proxy(lambda *args: error_body(503, "Overloaded.", "UNAVAILABLE"), max_retries=1)
        status, answer = r.ask(request(stream=True))
        self.assertEqual((status, answer["error"]["type"], len(r.fake.requests)), (529, "overloaded_error", 2))

    def test_connections_are_reused(self):
        r = self.run_proxy()
        for i in range(20):
            r.ask(request(stream=bool(i % 2)))
        self.assertEqual(len({q["client"] for q in r.fake.requests}), 1)
        at_once(8, lambda n: [r.ask(request(stream=bool(i % 2))) for i in range(10)])
        self.assertEqual(len(r.fake.requests), 100)
        self.assertLessEqual(len({q["client"] for q in r.fake.requests}), 8)

    def test_the_demo_answers_thinks_and_calls(self):
        r = self.run_proxy(upstream=proxy.DemoModel())
        message = check_grammar(r.ask(request("hello", stream=True, **THINK))[1])
        self.assertEqual([b["type"] for b in message["content"]], ["thinking", "text"])
        body = request("please run `echo hi`", tools=[TOOL], **THINK)
        first = r.ask(body)[1]
        self.assertEqual(summary(first)[-1], ("tool_use", ("Bash", {"command": "echo hi"})))
        id_ = first["content"][-1]["id"]
        body["messages"] += [{"role": "assistant", "content": first["content"]}, results(id_)]
        self.assertIn("r " + id_, summary(r.ask(body)[1])[-1][1])
        self.assertTrue(wait_for(lambda: len(r.server.traffic.last_hour()["recent"]) == 3))
        self.assertEqual(r.server.traffic.spent, 0)


# ---- 12. OpenAI-compatible upstreams and Anthropic ---------------------------------------------------------
OPENAI_FIELDS = set("model messages tools tool_choice parallel_tool_calls max_tokens max_completion_tokens temperature top_p top_k stop response_format"
                    " reasoning reasoning_effort stream stream_options plugins prompt_cache_key".split())


def openai_refusal(body, issued):
    """What a strict server would say to a body, or None. `issued` is {id of a call: what must come back with it}."""
    def wrong_user(content):
        if isinstance(content, str):
            return not content
        return not content or not isinstance(content, list) or any(
            not p["text"] if p["type"] == "text" else not re.match(r"data:image/\w+;base64,|https://", p["image_url"]["url"]) if p["type"] == "image_url"
            else not re.match("data:application/pdf;base64,", p["file"]["file_data"]) for p in content)
    messages, names = body["messages"], [t["function"]["name"] for t in body.get("tools", ())]
    if set(body) - OPENAI_FIELDS or ("stream_options" in body) != (body.get("stream") is True) or len({"max_tokens", "max_completion_tokens"} & set(body)) != 1:
        return "Unrecognized request argument: %s" % sorted(set(body) - OPENAI_FIELDS)
    for tool in body.get("tools", ()):
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool["function"]["name"]) or tool["function"]["parameters"].get("type") != "object" or tool["type"] != "function":
            return "Invalid 'tools'"
    choice = body.get("tool_choice", "auto")
    if len(set(names)) < len(names) or (not names and {"tools", "tool_choice", "parallel_tool_calls"} & set(body)):
        return "'tools' is empty or has doubles"
    if choice not in ("auto", "none", "required") and choice != {"type": "function", "function": {"name": choice["function"]["name"]}}:
        return "Invalid 'tool_choice'"
    open_ids, previous = [], ""
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if open_ids and role != "tool":
            return "messages[%d]: tool_call_ids without a response: %s" % (i, open_ids)
        if role == "tool":
            if message["tool_call_id"] not in open_ids or not isinstance(content, str):
                return "messages[%d]: a tool message must follow its call" % i
            open_ids.remove(message["tool_call_id"])
        elif role == previous or (role == "system") != (i == 0 and role == "system") or ("content" in message and content is None):
            return "messages[%d]: conversation roles must alternate" % i
        elif role == "user" and wrong_user(content):
            return "messages[%d]: invalid content" % i
        for call in message.get("tool_calls", ()):
            if not isinstance(json.loads(call["function"]["arguments"]), dict) or call["id"] in open_ids or not call["id"]:
                return "messages[%d]: invalid tool_calls" % i
            open_ids.append(call["id"])
            back = {k: v for k, v in dict(message, **call).items() if k in ("reasoning_details", "reasoning_content", "extra_content")}
            if back != issued.get(call["id"], back):
                return "messages[%d]: the reasoning of %s has not come back: %s" % (i, call["id"], back)
        previous = role
    return "the last message must be the user's or a tool's" if previous not in ("user", "tool") or open_ids else None


class FakeOpenAI(FakeServer):
    """A strict server for chat completions; `script(body)` -> chunks, or (status, error). Also what Anthropic's would see."""

    def __init__(self, script, models=()):
        super().__init__(("127.0.0.1", 0), OpenAIHandler)
        self.script, self.listed, self.requests, self.refusals, self.issued = script, models, [], [], {}
        self.url = "http://127.0.0.1:%d/v1" % self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()


class OpenAIHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.whole(200, {"data": [{"id": m, "context_length": 1000} for m in self.server.listed]} if self.server.listed else {})

    def whole(self, status, body, content_type="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        fake, raw = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        fake.requests.append({"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}, "raw": raw, "body": body})
        if "/messages" in self.path:
            return self.whole(*fake.script(body))
        problem = None if self.headers["Authorization"] == "Bearer ok" else "wrong key"
        problem = problem or openai_refusal(body, fake.issued)
        if problem:
            fake.refusals.append(problem)
            return self.whole(401 if problem == "wrong key" else 400, {"error": {"message": problem, "code": 400}})
        reply = fake.script(body)
        if isinstance(reply, tuple):
            return self.whole(reply[0], {"error": {"message": reply[1], "code": reply[0]}})
        if not body.get("stream"):
            return self.whole(200, completion(reply))
        frames = b": OPENROUTER PROCESSING\n\n" + b"".join(b"data: %s\n\n" % json.dumps(c).encode() for c in reply) + b"data: [DONE]\n\n"
        self.whole(200, frames, "text/event-stream")


def completion(chunks):
    """The whole answer that these chunks are the stream of."""
    message, finish, usage = {"role": "assistant", "content": ""}, None, None
    for c in chunks:
        for choice in c["choices"]:
            delta = choice.get("delta") or {}
            for key in ("content", "reasoning", "reasoning_content"):
                if delta.get(key):
                    message[key] = (message.get(key) or "") + delta[key]
            message.setdefault("reasoning_details", []).extend(delta.get("reasoning_details") or [])
            for call in delta.get("tool_calls") or []:
                own = message.setdefault("tool_calls", [])
                if call.get("id"):
                    own.append(json.loads(json.dumps(call)))
                else:
                    next(o for o in own if o["index"] == call["index"])["function"]["arguments"] += call["function"].get("arguments") or ""
            finish = choice.get("finish_reason") or finish
        usage = c.get("usage") or usage
        if "error" in c:
            return c
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def oa(finish=None, usage=None, **delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": usage}


def oa_call(index=0, arguments=None, id_=None, name=None, **more):
    return oa(tool_calls=[dict({"index": index, "function": {k: v for k, v in (("name", name), ("arguments", arguments)) if v is not None}}, **{"id": id_, "type": "function"} if id_ else {}, **more)])


USAGE = {"prompt_tokens": 100, "completion_tokens": 30, "total_tokens": 130, "prompt_tokens_details": {"cached_tokens": 40},
         "completion_tokens_details": {"reasoning_tokens": 10}, "cost": 0.25}
CHUNK_CASES = (  # name, chunks, what a reader gets, stop_reason
    ("text, nulls and nothing", [oa(role="assistant", content=""), oa(content=None), {"choices": []}, {"choices": [{"index": 0, "delta": None}]}, oa(content="a"), oa(content="b"), oa("stop")], [("text", "ab")], "end_turn"),
    ("reasoning, told twice", [oa(reasoning="t", reasoning_details=[{"type": "reasoning.text", "text": "t"}]), oa(content="a"), oa("stop")], [("thinking", "t"), ("text", "a")], "end_turn"),
    ("reasoning_content", [oa(reasoning_content="t", content=""), oa(content="a"), oa("stop")], [("thinking", "t"), ("text", "a")], "end_turn"),
    ("calls that come mixed", [oa_call(0, "", "a", "Bash"), oa_call(1, '{"command"', "b", "Bash"), oa_call(0, '{"comm', None, ""), oa_call(1, ': "2"}'), oa_call(0, 'and": "1"}'), oa("tool_calls")],
     [("tool_use", ("Bash", {"command": "1"})), ("tool_use", ("Bash", {"command": "2"}))], "tool_use"),
    ("one index for all", [oa_call(0, '{"command": "1"}', "a", "Bash"), oa_call(0, '{"command": "2"}', "b", "Bash"), oa("stop")],
     [("tool_use", ("Bash", {"command": "1"})), ("tool_use", ("Bash", {"command": "2"}))], "tool_use"),
    ("a new id in each piece", [oa_call(0, '{"command"', "a", "Bash"), oa_call(0, ': "1"}', "b"), oa("stop")], [("tool_use", ("Bash", {"command": "1"}))], "tool_use"),
    ("whole calls without ids", [oa_call(0, '{"command": "1"}', None, "Bash"), oa_call(0, '{"command": "2"}', None, "Bash"), oa("stop")],
     [("tool_use", ("Bash", {"command": "1"})), ("tool_use", ("Bash", {"command": "2"}))], "tool_use"),
    ("the name in each piece", [oa_call(0, '{"command"', "a", "Bash"), oa_call(0, ': "1"}', "a", "Bash"), oa("stop")], [("tool_use", ("Bash", {"command": "1"}))], "tool_use"),
    ("the whole message at the end", [oa(content="a"), {"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]}], [("text", "a")], "end_turn"),
    ("half a call at the end", [oa(content="a"), oa_call(0, '{"comm', "a", "Bash")], [("text", 'a\n\n[The model wrote a tool call that cannot be read. Bash: {"comm]')], "end_turn"),
    ("NaN in a call", [oa(content="a"), oa_call(0, '{"command": NaN}', "a", "Bash"), oa("stop")], [("text", 'a\n\n[The model wrote a tool call that cannot be read. Bash: {"command": NaN}]')], "end_turn"),
    ("no arguments, no end", [oa_call(0, None, "a", "Bash")], [("tool_use", ("Bash", {}))], "tool_use"),
    ("an object for arguments", [oa_call(None, {"command": "1"}, "a", "Bash"), oa("tool_calls")], [("tool_use", ("Bash", {"command": "1"}))], "tool_use"),
    ("arguments cut by the limit", [oa(content="a"), oa_call(0, '{"comm', "a", "Bash"), oa("length")], [("text", "a")], "max_tokens"),
    ("a broken call", [oa(content="a"), oa_call(0, '{"comm', "a", "Bash"), oa("tool_calls")], [("text", 'a\n\n[The model wrote a tool call that cannot be read. Bash: {"comm]')], "end_turn"),
    ("a filter", [oa(content="a"), oa("content_filter")], [("text", "a\n\n[The model stopped this answer: SAFETY.]")], "refusal"),
    ("a refusal", [oa(refusal="No."), oa(refusal=" Never."), oa("stop")], [("text", "No. Never.")], "refusal"),
    ("parts for a content", [oa(content=[{"type": "text", "text": "a"}]), oa("stop")], [("text", "a")], "end_turn"),
)
OPENAI_CASES = (  # name, dialect, request, the fields that the body must have
    ("a system prompt in two places", "other", request("a", {"role": "system", "content": "late"}, system=[{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]),
     {"messages": [{"role": "system", "content": "x\n\ny"}, {"role": "user", "content": "a\n\n<system-reminder>\nlate\n</system-reminder>"}], "max_tokens": 1000}),
    ("results in call order, media behind them", "openrouter", request("go", says(uses("t1"), uses("t2")), {"role": "user", "content": [
        {"type": "text", "text": "and"}, {"type": "tool_result", "tool_use_id": "t2", "content": [image()]}, {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True}]}),
     {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [
         {"id": i, "type": "function", "function": {"name": "Bash", "arguments": '{"command":"ls"}'}} for i in ("t1", "t2")]},
         {"role": "tool", "tool_call_id": "t1", "content": "Error: no"}, {"role": "tool", "tool_call_id": "t2", "content": ""},
         {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG}}, {"type": "text", "text": "and"}]}]}),
    ("a lost result and a lost call", "other", request("go", says({"type": "text", "text": "I look."}, uses("t1")), results("t9")),
     {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "Bash", "arguments": '{"command":"ls"}'}}]},
                   {"role": "tool", "tool_call_id": "t1", "content": "Error: no result (interrupted)"}, {"role": "user", "content": "Result of an earlier tool call:\nr t9"}]}),
    ("a call without text", "other", request("go", says(uses("t1")), results("t1")),
     {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "Bash", "arguments": '{"command":"ls"}'}}]},
                   {"role": "tool", "tool_call_id": "t1", "content": "r t1"}]}),
    ("a PDF", "openai", request({"role": "user", "content": [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}}]}, top_k=5),
     {"messages": [{"role": "user", "content": [{"type": "file", "file": {"filename": "document.pdf", "file_data": "data:application/pdf;base64," + PDF}}]}], "max_completion_tokens": 1000, "top_k": None}),
    ("a PDF where nobody reads it", "other", request({"role": "user", "content": [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}}]}, top_k=5),
     {"messages": [{"role": "user", "content": "[A document (application/pdf, %d bytes) that this server cannot read.]" % (len(PDF) * 3 // 4)}], "top_k": 5}),
    ("tools", "other", request(tools=[TOOL, dict(TOOL, name="mcp.x:y")], tool_choice={"type": "tool", "name": "mcp.x:y", "disable_parallel_tool_use": True}, stop_sequences=["x"], temperature=0.5),
     {"tool_choice": {"type": "function", "function": {"name": proxy.short_name("mcp.x:y", proxy._OPENAI_NAME)}}, "parallel_tool_calls": False, "stop": ["x"], "temperature": 0.5}),
    ("a form and an effort", "other", request(output_config={"effort": "max", "format": {"type": "json_schema", "schema": {"type": "object"}}}, thinking={"type": "adaptive"}),
     {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}, "reasoning_effort": "high", "reasoning": None}),
    ("no thinking", "openrouter", request(output_config={"effort": "low"}), {"reasoning": {"enabled": False}}),
    ("a budget", "openrouter", request(thinking={"type": "enabled", "budget_tokens": 2000}, max_tokens=5000), {"reasoning": {"max_tokens": 2000}}),
    ("a search", "openrouter", request(tools=[{"type": "web_search_20250305", "name": "web_search"}]), {"plugins": [{"id": "web"}], "tools": None}),
    ("Anthropic's cache", "openrouter", request("a", system="s", model="anthropic/claude-x"),
     {"messages": [{"role": role, "content": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}]} for role, text in (("system", "s"), ("user", "a"))]}),
)


class OtherUpstreams(unittest.TestCase):

    def run_proxy(self, script, models=(), **settings):
        fake = FakeOpenAI(script, models)
        self.addCleanup(fake.__exit__)
        settings = dict({"gemini_api_key": "", "openai_api_base": fake.url}, **settings)
        running = Running(**dict({"openrouter_api_key": "ok"}, **settings) if "openai_api_key" not in settings else settings)
        self.addCleanup(running.__exit__)
        self.addCleanup(lambda: self.assertEqual(fake.refusals, []))
        return running, fake

    def test_requests_become_chat_completions(self):
        for name, dialect, given, expected in OPENAI_CASES:
            with self.subTest(name):
                before = copy.deepcopy(given)
                body = proxy.to_openai(given, given["model"], CONFIG, dialect=dialect).body
                self.assertEqual({k: body.get(k) for k in expected}, expected)
                self.assertIsNone(openai_refusal(body, {}))
                self.assertEqual(given, before)

    def test_any_history_becomes_one_that_a_strict_server_takes(self):
        rng, cases = random.Random(int(os.environ.get("SEED", 5))), int(os.environ.get("CASES", 300))
        for _ in range(cases):
            body = mutated(rng, request("go", says(uses("t1"), uses("t2")), results("t1", "t2"), says({"type": "text", "text": "x"}), "more", tools=[TOOL]), 0.05)
            try:
                self.assertIsNone(openai_refusal(proxy.to_openai(proxy.check_request(body), "m", CONFIG).body, {}), body)
            except proxy.ProxyError:
                pass

    def test_any_chunks_are_read_or_refused(self):
        rng, cases = random.Random(int(os.environ.get("SEED", 6))), int(os.environ.get("CASES", 300))
        whole = [[dict(c, usage=USAGE) for c in chunks] for _, chunks, _, _ in CHUNK_CASES] + [[oa("stop", reasoning_details=[{"type": "reasoning.text", "text": "t", "index": 0, "id": "a"}] * 2, images=[{"image_url": {"url": "u"}}], annotations=[{"type": "url_citation", "url_citation": {"url": "u"}}])]]
        for _ in range(cases):
            chunks = [mutated(rng, c, 0.04) for c in rng.choice(whole)]
            reader = proxy.ChunksFromOpenAI()
            try:
                read = [reader.feed(c) for c in chunks if isinstance(c, dict)] + reader.end()
                emitted([json.loads(proxy.dump_json(c)) for c in read], tools=[TOOL], **THINK)
            except proxy.ProxyError:
                pass

    def test_answers_of_every_form_are_read(self):
        for name, chunks, expected, stop in CHUNK_CASES:
            with self.subTest(name):
                reader = proxy.ChunksFromOpenAI()
                message, _ = emitted([reader.feed(c) for c in chunks] + reader.end(), tools=[TOOL], **THINK)
                self.assertEqual((summary(message), message["stop_reason"]), (expected, stop))

    def test_a_tool_loop_brings_back_what_the_upstream_gave(self):
        kinds = {"reasoning_details": [{"type": "reasoning.text", "text": "th", "index": 0}, {"type": "reasoning.text", "text": "ink", "signature": "s", "index": 0},
                                       {"type": "reasoning.encrypted", "data": "xyz", "id": "f.Bash:0", "index": 1}],
                 "reasoning_content": "think", "extra_content": {"google": {"thought_signature": "abc"}}}
        for kind, value in kinds.items():
            for stream in (True, False):
                with self.subTest((kind, stream)):
                    def script(body):
                        done = sum(m["role"] == "tool" for m in body["messages"])
                        if done == 3:
                            return [oa(content="done"), oa("stop", USAGE)]
                        id_ = "f.Bash:%d" % done
                        back = dict(kinds, reasoning_details=[{"type": "reasoning.text", "text": "think", "signature": "s", "index": 0}, value[-1]])[kind] if kind == "reasoning_details" else value
                        fake.issued[id_] = {kind: back}
                        first = [oa(**{kind: [d]}) for d in value] if kind == "reasoning_details" else [oa(**{kind: value})] if kind != "extra_content" else []
                        call = oa_call(0, '{"command": "%d"}' % done, id_, "Bash", **{kind: value} if kind == "extra_content" else {})
                        return first[:1] + [call] + first[1:] + [oa("tool_calls", USAGE)]
                    r, fake = self.run_proxy(script)
                    body = request("go", model="anthropic/claude-x", tools=[TOOL], stream=stream, **THINK)
                    for i in range(4):
                        if i == 2:  # what was kept is lost; the thinking blocks carry it
                            r.server.signatures = proxy.SignatureCache(10, 10, 1000000)
                        answer = r.ask(body)[1]
                        message = check_grammar(answer) if stream else answer
                        if message["stop_reason"] == "tool_use":
                            body["messages"] += [{"role": "assistant", "content": message["content"]}, results(message["content"][-1]["id"])]
                    self.assertEqual((summary(message), len(fake.requests)), ([("text", "done")], 4))
                    self.assertEqual({k: v for k, v in message["usage"].items() if "tokens" in k and isinstance(v, int)},
                                     {"input_tokens": 60, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 40, "output_tokens": 30})
                    self.assertTrue(wait_for(lambda: r.server.traffic.spent == 1.0))

    def test_models_find_their_upstream(self):
        keys = {"g": {"gemini_api_key": "k"}, "r": {"openrouter_api_key": "k"}, "o": {"openai_api_key": "k"}, "l": {"openai_api_base": "http://localhost:1/v1"}, "a": {"anthropic_api_key": "k"}}
        for have, name, expected in (
                ("gr", "anthropic/claude-x", "openrouter/anthropic/claude-x"), ("gr", "openrouter/x/y:free", "openrouter/x/y:free"), ("gr", "claude-openrouter/x/y", "openrouter/x/y"),
                ("gr", "gemini-3.8-flash", "gemini-3.8-flash"), ("gr", "models/gemini-3.8-flash", "gemini-3.8-flash"), ("gr", "gemini/gemini-3.8-flash", "gemini-3.8-flash"), ("gr", "gemini/new-one", "new-one"), ("g", "models/new-one", "new-one"), ("g", "gemini/tunedModels/x", "tunedModels/x"),
                ("gr", "google/gemini-3.8-flash", "openrouter/google/gemini-3.8-flash"), ("g", "google/gemini-3.8-flash", "gemini-3.8-flash"), ("gr", "claude-opus-5", "gemini-3.8-flash"),
                ("r", "claude-opus-5[1m]", "openrouter/~anthropic/claude-sonnet-latest"), ("r", "claude-haiku-4-5", "openrouter/anthropic/claude-haiku-4.5"), ("r", "openai/gpt-5", "openrouter/openai/gpt-5"),
                ("gro", "openai/gpt-5", "openai/gpt-5"), ("gro", "x/y", "openrouter/x/y"), ("l", "claude-opus-5", "openai/default"), ("l", "openai/llama", "openai/llama"), ("l", "meta/llama", "openai/meta/llama"),
                ("ga", "anthropic/claude-x", "anthropic/claude-x"), ("gra", "anthropic/claude-x", "openrouter/anthropic/claude-x"), ("a", "claude-opus-5", "anthropic/claude-opus-5"),
                ("g", "anthropic/claude-x", "gemini-3.8-flash"), ("g", "openrouter/x/y", "gemini-3.8-flash"), ("gl", "anthropic/claude-x", "gemini-3.8-flash"),
                ("l", "anthropic/claude-x", "openai/default"), ("gl", "meta/llama", "gemini-3.8-flash"), ("o", "gpt-9", "openai/gpt-9")):
            config = proxy.Config(**dict(pair for letter in have for pair in keys[letter].items()))
            self.assertEqual(proxy.resolve_model(name, config).name, expected, (have, name))
        config = proxy.Config(gemini_api_key="k", openrouter_api_key="k", upstream="openai", big_model="x/y", small_model="gemini-2.5-flash")
        self.assertEqual([proxy.resolve_model(n, config).name for n in ("claude-opus-5", "haiku", "whatever")], ["openrouter/x/y", "gemini-2.5-flash", "openrouter/x/y"])
        with self.assertRaisesRegex(proxy.ProxyError, "OPENROUTER_API_KEY"):
            proxy.resolve_model("x", proxy.Config(gemini_api_key="k", anthropic_model="openrouter/x/y"))
        for setting in ({"fallback_models": "gemini-2.5-pro,openai/x"}, {"big_model": "openrouter/x/y"}):
            with self.assertRaisesRegex(ValueError, "model: .* needs .*_API_KEY"):
                proxy.Config(gemini_api_key="k", **setting)
        self.assertEqual([proxy.Config(**k).base(u) for k, u in (({"openrouter_api_key": "k"}, "openrouter"), ({"openai_api_key": "k"}, "openai"), ({"openrouter_api_key": "k", "openai_api_base": "http://x"}, "openrouter"),
                                                                ({"openrouter_api_key": "k", "openai_api_base": "http://x", "openai_api_key": "k"}, "openrouter"))],
                         [proxy.OPENROUTER_BASE, proxy.OPENAI_BASE, "http://x", proxy.OPENROUTER_BASE])

    def test_an_unknown_model_is_refused_with_its_like(self):
        r, fake = self.run_proxy(lambda body: [oa(content=body["model"]), oa("stop")], ["meta/llama-4-maverick", "meta/llama-4-scout", "x/y"])
        status, answer = r.ask(request(model="meta/llama-4-maveric"))
        self.assertEqual((status, answer["error"]["message"], fake.requests), (404, "model: openrouter/meta/llama-4-maveric is not offered; there are meta/llama-4-maverick, meta/llama-4-scout", []))
        self.assertEqual(summary(r.ask(request(model="x/y:nitro"))[1]), [("text", "x/y:nitro")])
        self.assertIn("is not offered", r.ask(request(model="gemini-3.8-flash"))[1]["error"]["message"])
        self.assertIn("openrouter/x/y", [m["id"] for m in json.loads(r.send("GET", "/v1/models?limit=1000")[2])["data"]])
        r, fake = self.run_proxy(lambda body: [oa(content=body["model"]), oa("stop")], ["the-only-one"], openai_api_key="ok")
        self.assertEqual(summary(r.ask(request(model="claude-opus-5"))[1]), [("text", "the-only-one")])

    def test_refused_fields_are_left_out_and_that_is_remembered(self):
        def script(body):
            if "max_tokens" in body:
                return 400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            if "temperature" in body:
                return 400, "Unsupported value: 'temperature' does not support 0.5 with this model."
            if any(isinstance(m.get("content"), list) for m in body["messages"]):
                return 400, "Invalid 'messages[0]'. Content blocks are expected to be text."
            return [oa(content="ok"), oa("stop")]
        r, fake = self.run_proxy(script)
        fake.listed = ["x/y"]
        for i in range(2):
            self.assertEqual(summary(r.ask(request({"role": "user", "content": [image()]}, model="x/y", temperature=0.5))[1]), [("text", "ok")])
            self.assertEqual(len(fake.requests), 4 + 2 * i)  # images are tried anew: the next one may be better
        self.assertEqual(fake.requests[-1]["body"]["messages"][0]["content"], "[An image that this model cannot see.]")

    def test_what_a_400_may_mean_is_mended_and_nothing_else(self):
        body = {"model": "m", "max_tokens": 60000, "temperature": 1, "stream_options": {}, "messages": [{"role": "user", "content": [{"type": "image_url"}]},
                {"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "content": "r"}, {"role": "user", "content": "more"}]}
        for message, names, field, value in (
                ("Invalid schema for function 'Read_file'", [], "", None), ("temperature must be at most 2", [], "", None), ("Unrecognized request argument supplied: stream_options", ["stream_options"], "stream_options", None),
                ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'", ["max_tokens"], "max_completion_tokens", 60000),
                ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", ["a larger max_tokens"], "max_tokens", 8192), ("max_tokens: 60000 > 32000, which is the maximum", ["a larger max_tokens"], "max_tokens", 32000),
                ("maximum context length is 32768 tokens. However, you requested 33000 tokens (1000 in the messages, 32000 in the completion)", ["a larger max_tokens"], "max_tokens", 32768 - 1000 - 16),
                ("temperature: only 1 is allowed for this model", ["temperature"], "temperature", None),
                ("max_tokens is too large: 60000. This model supports at most 16384 completion tokens", ["a larger max_tokens"], "max_tokens", 16384),
                ("This model's maximum context length is 32768 tokens and your request has 17459 input tokens", ["a larger max_tokens"], "max_tokens", 32768 - 17459 - 16),
                ("`reasoning_content` in the thinking mode must be passed back", ["a call without reasoning_content"], "messages", [{"role": "user", "content": [{"type": "image_url"}]},
                 {"role": "assistant", "content": "", "tool_calls": [], "reasoning_content": " "}] + body["messages"][2:]),
                ("Unexpected role 'user' after role 'tool'", ["a text after tools"], "messages", body["messages"][:2] + [{"role": "tool", "content": "r\n\nmore"}]),
                ("This model does not support image input", ["media"], "messages", [{"role": "user", "content": "[An image that this model cannot see.]"}] + body["messages"][1:])):
            with self.subTest(message):
                found = dict(proxy.openai_repairs(body, message))
                self.assertEqual(list(found), names)
                self.assertEqual([b.get(field) for b in found.values()], [value] * len(names))

    def test_nothing_goes_where_it_does_not_belong(self):
        fake = FakeOpenAI(lambda body: [oa(content="x"), oa("stop")])
        self.addCleanup(fake.__exit__)
        r = Running(client_keys=True, openai_api_key="ok", openai_api_base=fake.url, fallback_models="openai/m", max_retries=0, script=lambda *args: error_body(429, "Quota.", "RESOURCE_EXHAUSTED"))
        self.addCleanup(r.__exit__)
        self.assertEqual(summary(r.ask(request(), x_api_key="the-client's-own")[1]), [("text", "x")])  # 429 at Gemini, then openai/m
        self.assertEqual([q["headers"]["authorization"] for q in fake.requests], ["Bearer ok"])
        r2 = Running(client_keys=True, openai_api_key="bad,ok", openai_api_base=fake.url)
        self.addCleanup(r2.__exit__)
        self.assertEqual(summary(r2.ask(request(model="openai/m"), x_api_key="k")[1]), [("text", "x")])  # of our own keys, the next
        long = dict(TOOL, name="mcp.server:" + "x" * 80)
        r.fake.script, fake.script = r.fake.script, lambda body: [oa_call(0, "{}", "a", body["tools"][0]["function"]["name"]), oa("stop")]
        self.assertEqual(summary(r.ask(request(tools=[long]), x_api_key="k")[1]), [("tool_use", (long["name"], {}))])  # an alias of the second model
        for env in ({"GEMINI_TOKEN_COMMAND": "x"}, {"CLIENT_KEYS": "true"}, {"ANTHROPIC_AUTH_TOKEN": "AIza" + "x" * 35}):
            with self.assertRaisesRegex(ValueError, "put both in one place"):
                proxy.load_config({}, env, {"GEMINI_API_BASE": "http://x"})
        kept = proxy.kept_signature({"reasoning_details": [1]}, "openrouter")
        self.assertEqual([proxy.kept_fields(kept, d) for d in ("openrouter", "other")], [{"reasoning_details": [1]}, {}])
        self.assertFalse(proxy.Translation(proxy.model_rule("gemini-3.8-flash"), lambda key: None).takes(kept))
        r = Running(fallback_models="anthropic/claude-x", anthropic_api_key="k", script=lambda *args: error_body(429, "Quota.", "RESOURCE_EXHAUSTED"), max_retries=0)
        self.addCleanup(r.__exit__)
        self.assertEqual(r.ask(request())[0], 429)  # what the fallback says would only mislead
        r = Running(gemini_api_key="", anthropic_api_key="k")
        self.addCleanup(r.__exit__)
        self.assertIn(b"passes through as it is", r.send("GET", "/test-connection")[2])

    def test_where_a_stream_ends(self):
        def frame(c):
            return b"data: %s\n\n" % (c if isinstance(c, bytes) else json.dumps(c).encode())
        a, stop, done = oa(content="a"), oa("stop"), b"[DONE]"
        for name, pieces, expected in (("it stays open", [a, stop, 1.0], "a"), ("pings go on behind it", [a, stop] + [0.05, b""] * 20, "a"), ("it is cut behind its end", [a, stop, "cut"], "a"),
                                       ("only [DONE]", [a, done], "a"), ("neither", [a], None), ("an end in each chunk", [oa("stop", content="a"), 0.3, oa("stop", content="b"), 0.3, oa(content="c")], "abc")):
            with self.subTest(name):
                r, fake = self.run_proxy(lambda body: [], max_retries=0)
                r.server.upstream.members["openrouter"].LAST_SECONDS = 0.1 if expected != "abc" else 0.4

                class Scripted(OpenAIHandler):
                    def whole(self, status, body, content_type="application/json"):
                        if content_type != "text/event-stream":
                            return super().whole(status, body, content_type)
                        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%s\r\n" % (b"Content-Length: 9999\r\n" if "cut" in pieces else b""))
                        with contextlib.suppress(OSError):
                            for piece in pieces:
                                time.sleep(piece) if isinstance(piece, float) else self.wfile.write(frame(piece) if piece not in ("cut", b"") else b": ping\n\n")
                        self.close_connection = True
                fake.RequestHandlerClass = Scripted
                started = time.monotonic()
                status, events = r.ask(request(model="x/y", stream=True))
                if expected:
                    self.assertEqual(summary(check_grammar(events)), [("text", expected)])
                else:
                    self.assertEqual(events[-1]["type"], "error")
                self.assertLess(time.monotonic() - started, 0.9)

    def test_no_finish_reason_is_not_one(self):
        r = Running(lambda *args: [chunk("a", finishReason=None), 0.3, chunk("b", finishReason="FINISH_REASON_UNSPECIFIED"), 0.3, chunk("c", finish="STOP"), 0.05, {"usageMetadata": {"promptTokenCount": 5}}])
        self.addCleanup(r.__exit__)
        r.server.upstream.members["gemini"].LAST_SECONDS = 0.15
        message = check_grammar(r.ask(request(stream=True))[1])
        self.assertEqual((summary(message), message["usage"]["input_tokens"]), ([("text", "abc")], 5))

    def test_odd_usage_spoils_no_answer(self):
        error = proxy.upstream_error(400, {"error": {"message": "Provider returned error", "metadata": {"raw": "\ud800 why"}}}, name="OpenRouter")
        self.assertEqual(error.message, "OpenRouter answered 400: Provider returned error: ? why")
        for usage in ({"prompt_tokens": "x"}, {"cost": "1", "is_byok": True}, {"cost": 0.5, "is_byok": True, "cost_details": {"upstream_inference_cost": "x"}}, {"completion_tokens_details": None, "total_tokens": []}, "x", [1], {"prompt_tokens_details": "x"}):
            message, _ = emitted([proxy.ChunksFromOpenAI().feed(oa("stop", usage, content="a"))])
            self.assertEqual(summary(message), [("text", "a")])

    def test_errors_retries_and_fallbacks_are_the_shared_ones(self):
        for reply, status, text in (((401, "no"), 403, "OPENROUTER_API_KEY"), ((402, "Insufficient credits"), 402, "OpenRouter requires payment: Insufficient credits"), ((403, "Flagged."), 400, "OpenRouter refused this request: Flagged."),
                                    ((400, "This model's maximum prompt length is 131072 but the request contains 200000 tokens."), 400, "prompt is too long: 200000 tokens > 131072 maximum"), ((400, "This endpoint's maximum context length is 200000 tokens. However, you requested about 2500021 tokens"), 400, "prompt is too long: 2500021 tokens > 200000 maximum"),
                                    ((429, "Please try again in 20s"), 429, "OpenRouter's rate limit"), ((503, "busy"), 529, "OpenRouter is overloaded"), ([{"error": {"code": 502, "message": "Provider broke"}, "choices": []}], 529, "Provider broke"),
                                    ([oa("error")], 500, "it stopped with an error")):
            r, fake = self.run_proxy(lambda body: reply, max_retries=1)
            status_, answer = r.ask(request(model="x/y", stream=True))
            self.assertEqual((status_, text in answer["error"]["message"]), (status, True), answer)
            self.assertEqual(len(fake.requests), 2 if status in (529, 500) else 1)
        fake = FakeOpenAI(lambda body: [oa(content="from " + body["model"]), oa("stop")])
        self.addCleanup(fake.__exit__)
        r = Running(lambda *args: error_body(429, "Quota.", "RESOURCE_EXHAUSTED"), fallback_models=("openrouter/x/y",), openrouter_api_key="ok", openai_api_base=fake.url, max_retries=0)
        self.addCleanup(r.__exit__)
        self.assertEqual(summary(check_grammar(r.ask(request(stream=True))[1])), [("text", "from x/y")])
        self.assertTrue(wait_for(lambda: b'requests_total{model="openrouter/x/y"} 1' in r.send("GET", "/metrics")[2]))

    def test_vertex_gets_the_forms_that_it_knows(self):
        fake = FakeOpenAI(lambda body: (200, json.dumps(dict(chunk("ok", finish="STOP"), totalTokens=77)).encode()))
        self.addCleanup(fake.__exit__)
        r = Running(gemini_api_base=fake.url + "/aiplatform/messages", gemini_auth_type="bearer", gemini_token_command="echo token-1")
        self.addCleanup(r.__exit__)
        body = request(tools=[TOOL, {"type": "web_search_20250305", "name": "web_search"}], system="s")
        self.assertEqual(summary(r.ask(body)[1]), [("text", "ok")])
        self.assertEqual(json.loads(r.send("POST", "/v1/messages/count_tokens", body)[2]), {"input_tokens": 77})
        first, second = fake.requests
        self.assertEqual((first["path"], first["headers"]["authorization"]), ("/v1/aiplatform/messages/models/gemini-3.8-flash:generateContent", "Bearer token-1"))
        self.assertEqual((first["body"]["toolConfig"], len(first["body"]["tools"]), "store" in first["body"]), ({}, 2, False))
        self.assertEqual((second["path"][-12:], set(second["body"])), (":countTokens", {"contents", "systemInstruction", "tools"}))

    def test_anthropic_gets_and_gives_everything_as_it_is(self):
        sent = b'event: message_start\ndata: {"x": 1}\n\nevent: error\ndata: {"type":"error"}\n\n'
        fake = FakeOpenAI(lambda body: (200, sent, "text/event-stream") if body.get("stream") else (418, b'{"odd":  true}'))
        self.addCleanup(fake.__exit__)
        base, proxy.ANTHROPIC_BASE = proxy.ANTHROPIC_BASE, fake.url[:-3]
        self.addCleanup(setattr, proxy, "ANTHROPIC_BASE", base)
        r = Running(gemini_api_key="", anthropic_api_key="sk-own")
        self.addCleanup(r.__exit__)
        raw = b'{ "model": "claude-opus-5", "stream": true, "messages": [], "unknown": [1.50] }'
        status, headers, data = r.send("POST", "/v1/messages?beta=true", raw, anthropic_beta="b1,b2", x_api_key="local", x_secret="s")
        self.assertEqual((status, headers["content-type"], data), (200, "text/event-stream", sent))
        got = fake.requests[0]
        self.assertEqual((got["path"], got["raw"], got["headers"]["x-api-key"], got["headers"]["anthropic-beta"]), ("/v1/messages?beta=true", raw, "sk-own", "b1,b2"))
        self.assertFalse({"x-secret", "authorization"} & set(got["headers"]))
        mine = {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": proxy.CALL_MARK + "x"}, {"type": "text", "text": "a"}]}
        r.send("POST", "/v1/messages", {"model": "claude-opus-5", "stream": True, "messages": [mine]})
        self.assertEqual(fake.requests.pop()["body"]["messages"][0]["content"], [{"type": "text", "text": "a"}])
        status, headers, data = r.send("POST", "/v1/messages/count_tokens", b'{"model": "anthropic/claude-opus-5"}')
        self.assertEqual((status, data, fake.requests[1]["body"]), (418, b'{"odd":  true}', {"model": "claude-opus-5"}))


# ---- 13. Faults, load, and who may come in -----------------------------------------------------------------
def wait_for(test, seconds=5.0):
    """Whether `test()` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not test() and time.monotonic() < deadline:
        time.sleep(0.01)
    return test()


def post_bytes(body, extra=b""):
    data = json.dumps(body).encode()
    return b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n" % (extra, len(data)) + data


class Faults(unittest.TestCase):
    run_proxy = EndToEnd.run_proxy

    def test_what_is_retried_and_what_is_not(self):
        ok = [chunk("ok", finish="STOP")]
        for first, calls, status in ((error_body(500, "Fault."), 2, 200), (error_body(504, "Deadline."), 2, 200), (["reset"], 2, 200), (["cut", chunk("x")], 2, 200),
                                     ((200, {}, b"not json"), 2, 200), ((502, {}, b"<html>Bad gateway"), 2, 200), (error_body(400, "Wrong."), 1, 400),
                                     (error_body(429, "Please retry in 0.2s."), 2, 200), (error_body(429, "Please retry in 40s."), 1, 429), (quota("PerDay"), 1, 429),
                                     (error_body(403, "Leaked."), 1, 403), (error_body(402, "Credit."), 1, 402)):
            for stream in (True, False):
                with self.subTest(first, stream=stream):
                    r = self.run_proxy([first, ok])
                    self.assertEqual((r.ask(request(stream=stream))[0], len(r.fake.requests)), (status, calls))

    def test_a_stream_that_breaks_before_anything_was_said_is_asked_for_again(self):
        r = self.run_proxy([[chunk({"text": "hm", "thought": True}), "cut"], [chunk("ok", finish="STOP")]])
        r.fake.script[0].insert(0, {"candidates": []})
        self.assertEqual(summary(check_grammar(r.ask(request(stream=True))[1])), [("text", "ok")])

    def test_the_last_try_is_without_a_stream(self):
        r = self.run_proxy(lambda body, m, path: ["reset"] if "stream" in path else chunk("ok", finish="STOP"))
        self.assertEqual(summary(check_grammar(r.ask(request(stream=True))[1])), [("text", "ok")])
        self.assertEqual([q["action"] for q in r.fake.requests], ["streamGenerateContent"] * 2 + ["generateContent"])

    def test_streams_that_keep_breaking_are_left_alone_for_a_minute(self):
        r = self.run_proxy(lambda body, m, path: [chunk("a"), "cut"] if "stream" in path else chunk("whole", finish="STOP"))
        for _ in range(3):
            self.assertEqual(r.ask(request(stream=True))[1][-1]["type"], "error")
        self.assertEqual(summary(check_grammar(r.ask(request(stream=True))[1])), [("text", "whole")])

    def test_tries_are_bound_over_all_kinds_of_failure(self):
        replies = itertools.cycle([error_body(503, "Overloaded."), error_body(503, "Overloaded."), [chunk("", finish="STOP")]])
        r = self.run_proxy(lambda *args: next(replies))
        r.ask(request(stream=True))
        self.assertEqual(len(r.fake.requests), 3)
        tiny = error_body(429, "Slow down.", details=[{"retryDelay": "0.001s"}])
        r = self.run_proxy(lambda *args: tiny, gemini_api_key="k1,k2,k3")
        self.assertEqual(r.ask(request())[0], 429)
        self.assertLessEqual(len(r.fake.requests), 5)

    def test_a_cut_that_no_framing_shows_is_no_end(self):
        data = b"data: %s\r\n\r\n" % json.dumps(chunk("Hello")).encode()
        for body, kind in ((data, "error"), (data + b"data: %s\r\n\r\n" % json.dumps(chunk(finish="STOP")).encode(), "message_stop")):
            listener = socket.create_server(("127.0.0.1", 0))
            self.addCleanup(listener.close)

            def upstream():
                with contextlib.suppress(OSError):
                    while True:
                        sock = listener.accept()[0]
                        sock.recv(65536)
                        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body)
                        sock.close()
            threading.Thread(target=upstream, daemon=True).start()
            r = self.run_proxy(gemini_api_base="http://127.0.0.1:%d/v1beta" % listener.getsockname()[1])
            self.assertEqual(r.ask(request(stream=True))[1][-1]["type"], kind)
            listener.shutdown(socket.SHUT_RDWR)

    def test_half_a_tool_call_is_never_given_out(self):
        half = json.dumps(chunk(BASH)).encode()
        r = self.run_proxy(lambda *args: [chunk("a"), b"data: " + half[:60], "cut"])
        events = r.ask(request(stream=True, tools=[TOOL]))[1]
        self.assertEqual(events[-1]["type"], "error")
        self.assertNotIn("tool_use", [e.get("content_block", {}).get("type") for e in events])

    def test_a_stale_connection_is_replaced_silently(self):
        r = self.run_proxy(max_retries=0)
        r.ask(request())
        r.fake.close_idle()
        self.assertEqual(r.ask(request())[0], 200)

    def test_keys_that_fail_rest_for_their_model(self):
        def script(body, model_, path):
            key = r.fake.requests[-1]["headers"]["x-goog-api-key"]
            return quota("PerMinute") if key == "k1" and model_ == "gemini-3.8-flash" else error_body(400, "Wrong.") if key == "k3" else [chunk(key, finish="STOP")]
        r = self.run_proxy(script, gemini_api_key="k1,k2,k3")
        self.assertEqual(summary(r.ask(request())[1]), [("text", "k2")])       # k1 is at its limit
        self.assertEqual(r.ask(request())[0], 400)                              # k3: a 400 is not the key's fault
        self.assertEqual([summary(r.ask(request())[1]) for _ in range(1)], [[("text", "k2")]])
        self.assertEqual(r.ask(request())[0], 400)
        self.assertEqual(summary(r.ask(request(model="gemini-3.6-flash"))[1]), [("text", "k1")])
        self.assertEqual([list(key["cooldown"]) for key in r.server.upstream.key_states() if key["cooldown"]], [["gemini-3.8-flash"]])

    def test_fallback_models_answer_for_overload_and_not_found(self):
        for trouble in (error_body(503, "Overloaded."), not_found("gemini-3.8-flash", "x")):
            r = self.run_proxy(lambda body, m, path: trouble if m == "gemini-3.8-flash" else [chunk(m, finish="STOP")], fallback_models=("gemini-2.5-flash",), max_retries=0)
            self.assertEqual(summary(r.ask(request(**THINK))[1]), [("text", "gemini-2.5-flash")])
            self.assertEqual(r.fake.refusals, [])  # translated anew for the other family
            self.assertTrue(wait_for(lambda: b'requests_total{model="gemini-2.5-flash"} 1' in r.send("GET", "/metrics")[2]))

    def test_a_client_that_leaves_is_noticed_in_every_phase(self):
        for stream, script in ((True, [chunk("a"), "hang"]), (True, ["hang"]), (False, ["hang"]), (True, error_body(429, "Please retry in 4s."))):
            with self.subTest(stream=stream, script=script):
                r = self.run_proxy(lambda *args: script, gemini_api_key="k1,k2", ping_interval=0.2)
                with socket.create_connection(("127.0.0.1", r.port)) as sock:
                    sock.sendall(post_bytes(request(stream=stream)))
                    self.assertTrue(wait_for(lambda: r.fake.requests))
                    time.sleep(0.1)
                self.assertTrue(wait_for(lambda: not r.server.active, 3), "the thread stays")
                self.assertEqual((len(r.server.heartbeat.exchanges()), len(r.fake.requests)), (0, 1 if isinstance(script, list) else 2))

    def test_a_client_that_leaves_before_upstream_is_connected_stops_nobody_else(self):
        exchange = proxy.Exchange({}, [proxy.Route("gemini", "")])
        exchange.use(http.client.HTTPConnection("127.0.0.1", 9))  # not connected yet
        exchange.cancel()
        self.assertTrue(exchange.disconnected.is_set())

    def test_a_client_that_leaves_behind_unread_bytes_or_a_silent_handshake_is_noticed(self):
        listener = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word
        self.addCleanup(listener.close)
        for base in (None, "https://127.0.0.1:%d/v1beta" % listener.getsockname()[1]):
            settings = {"gemini_api_base": base} if base else {}
            r = self.run_proxy(lambda *args: ["hang"], ping_interval=0.2, **settings)
            with socket.create_connection(("127.0.0.1", r.port)) as sock:
                sock.sendall(post_bytes(request(stream=True)) + (b"" if base else b"GET /"))
                time.sleep(0.1)
            self.assertTrue(wait_for(lambda: not r.server.active, 3), base)

    def test_heads_that_can_be_read_in_two_ways_are_refused(self):
        r = self.run_proxy()
        inner = post_bytes(request())
        for line in (b"Content-Length: 0\r\nContent-Length: %d" % len(inner), b"X y: 1\r\nOrigin: http://evil", b"Content-Length : 5", b"Host: a\r\nHost: b",
                     b"X: a\rOrigin: http://evil", b"X-Y\r\nOrigin: http://evil", b"Transfer-Encoding: \x0bchunked", b"X: a\x00b"):
            for first in (b"POST /v1/messages", b"GET /health", b"HEAD /"):
                answer = r.raw(first + b" HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n\r\n" + inner)
                if not (first == b"HEAD /" or b"chunked" in line):
                    self.assertRegex(answer, rb"^HTTP/1\.1 40[03] ", (first, line))
                self.assertEqual(answer.count(b"HTTP/1.1 "), 1, (first, line, answer))
        self.assertEqual(r.fake.requests, [])

    def test_two_hundred_slow_streams(self):
        def script(body, model_, path):
            n = int(body["contents"][0]["parts"][0]["text"])
            return [chunk("%d " % n), 0.1, chunk("is "), 0.1] + (["cut"] if n % 4 == 0 else [chunk("done", finish="STOP")])
        r = self.run_proxy(script, max_retries=0)
        r.server.upstream.members["gemini"].BROKEN_STREAMS = 1000
        before, answers = threading.active_count(), {}

        def client(n):
            answers[n] = r.ask(request(str(n), stream=True))[1]

        threads = [threading.Thread(target=client, args=(n,)) for n in range(200)]
        started = time.monotonic()
        [t.start() for t in threads], [t.join(30) for t in threads]
        self.assertLess(time.monotonic() - started, 15)
        for n, events in answers.items():
            self.assertIsInstance(events, list, (n, events))
            if n % 4 == 0:
                self.assertEqual(events[-1]["type"], "error")
            else:
                self.assertEqual(summary(check_grammar(events)), [("text", "%d is done" % n)])
        self.assertEqual(len(answers), 200)
        self.assertTrue(wait_for(lambda: r.server.active == 0))
        r.server.upstream.close()
        self.assertTrue(wait_for(lambda: threading.active_count() <= before + 1), threading.active_count())

    def test_too_many_connections_are_told_at_once(self):
        r = self.run_proxy(lambda *args: ["hang"], max_connections=2)
        held = [socket.create_connection(("127.0.0.1", r.port)) for _ in range(2)]
        self.assertTrue(wait_for(lambda: r.server.active == 2))
        status, headers, data = r.send("POST", "/v1/messages", request())
        self.assertEqual((status, json.loads(data)["error"]["type"], headers["retry-after"]), (529, "overloaded_error", "2"))
        [s.close() for s in held]
        self.assertTrue(wait_for(lambda: r.server.active == 0))
        self.assertEqual(r.send("GET", "/health")[0], 200)

    def test_slow_clients_are_cut_and_hold_up_nobody(self):
        r = self.run_proxy()
        for name, seconds in (("head_seconds", 0.7), ("body_seconds", 0.7), ("idle_seconds", 0.7), ("drain_seconds", 0.5)):
            self.addCleanup(setattr, proxy.ProxyHandler, name, getattr(proxy.ProxyHandler, name))
            setattr(proxy.ProxyHandler, name, seconds)
        slow = [socket.create_connection(("127.0.0.1", r.port)) for _ in range(100)]
        for i, sock in enumerate(slow):
            sock.sendall((b"", b"POST /v1/mess", post_bytes(request())[:-5])[i % 3])
        for _ in range(3):
            time.sleep(0.2)
            for i, sock in enumerate(slow):
                if i % 3:
                    sock.sendall(b"a")
        self.assertEqual(r.ask(request())[0], 200)
        self.assertTrue(wait_for(lambda: r.server.active == 0, 3), r.server.active)
        answers = []
        for sock in slow:
            with contextlib.suppress(ConnectionError):
                answers.append(sock.recv(100)[:12])
            sock.close()
        self.assertIn(b"HTTP/1.1 408", answers)

    def test_browsers_are_refused_before_anything_reaches_gemini(self):
        r = self.run_proxy()
        own = "127.0.0.1:%d" % r.port
        for headers, status in (({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
                                ({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1.evil.example"}, 403), ({"Host": "localhost.evil.example:80"}, 403), ({"Origin": "http://localhost:1"}, 403),
                                ({"Origin": "http://" + own}, 200), ({"Sec-Fetch-Site": "same-origin"}, 200), ({"Host": "localhost:%d" % r.port}, 200), ({"Host": "[::1]:1"}, 200)):
            for method, path in (("POST", "/v1/messages"), ("GET", "/test-connection"), ("OPTIONS", "/v1/messages"), ("GET", "/health")):
                got, head, data = r.send(method, path, request() if method == "POST" else None, **headers)
                if status == 403:
                    self.assertEqual(got, 403, (headers, path))
                elif method != "OPTIONS":
                    self.assertEqual(got, 200, (headers, path, data))
                self.assertFalse([name for name in head if name.lower().startswith("access-control")])
        self.assertEqual(len(r.fake.requests), 8)

    def test_keys_and_tokens_are_nowhere_to_be_seen(self):
        canary, token = "AIzaCANARY" + "x" * 30, "tok-CANARY-123456"
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        log = logging.getLogger("claude_gemini_proxy")
        level = log.level
        log.addHandler(handler), log.setLevel(logging.DEBUG)
        self.addCleanup(lambda: (log.removeHandler(handler), log.setLevel(level)))
        seen = []
        for reply in (BAD_KEY, error_body(403, "Key %s was reported as leaked." % canary), error_body(429, "Quota of %s." % canary), (500, {}, canary.encode()), ["reset"], (200, {}, b"{" + canary.encode()),
                      [chunk("a"), {"error": {"code": 503, "message": canary}}], error_body(400, "API key %s is wrong" % canary), [b"data: 5\r\n\r\n"], [{"candidates": 5}]):
            r = self.run_proxy(lambda *args: reply, gemini_api_key=canary, proxy_auth_token=token, debug=True, max_retries=0)
            for stream_ in (True, False):
                seen.append(r.send("POST", "/v1/messages", request("my key is " + canary, stream=stream_), x_api_key=token)[2])
            seen += [r.send("GET", path, None, authorization="Bearer " + token)[2] for path in ("/", "/metrics", "/health", "/test-connection", "/v1/models")]
            seen += [r.send("GET", "/" + token + canary)[2], r.send("GET", "/", None, x_api_key=canary)[2], repr(r.config).encode(), repr(r.server.upstream).encode()]
        text = stream.getvalue() + b"".join(seen).decode()
        self.assertIn("upstream:", text)
        for secret in (canary, token):
            self.assertNotIn(secret, text)

    def test_a_company_proxy_and_a_private_ca(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (("ca.pem", CA), ("server.pem", SERVER)):
                with open(os.path.join(folder, name), "w") as file:
                    file.write(text)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(os.path.join(folder, "server.pem"))
            fake = FakeGemini(repeat)
            self.addCleanup(fake.__exit__)
            fake.server.socket = context.wrap_socket(fake.server.socket, server_side=True)
            tunnel = Tunnel()
            self.addCleanup(tunnel.close)
            self.addCleanup(fake.close_idle)
            base = fake.url.replace("http://127.0.0.1", "https://localhost")
            saved = {k: os.environ.get(k) for k in ("HTTPS_PROXY", "NO_PROXY", "no_proxy", "SSL_CERT_FILE")}
            self.addCleanup(lambda: [os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v) for k, v in saved.items()])
            os.environ.pop("no_proxy", None)
            for settings, status, tunnelled in (({}, 500, 0), ({"SSL_CERT_FILE": "ca.pem"}, 200, 0), ({"SSL_CERT_FILE": "ca.pem", "HTTPS_PROXY": tunnel.url}, 200, 1),
                                                ({"SSL_CERT_FILE": "ca.pem", "HTTPS_PROXY": tunnel.url, "NO_PROXY": "localhost"}, 200, 1)):
                with self.subTest(settings):
                    [os.environ.pop(k, None) for k in saved]
                    os.environ.update({k: os.path.join(folder, v) if k == "SSL_CERT_FILE" else v for k, v in settings.items()})
                    with Running(gemini_api_base=base, max_retries=0) as r:
                        for _ in range(3):
                            got, answer = r.ask(request())
                            self.assertEqual(got, status, answer)
                    self.assertEqual(len(tunnel.places), tunnelled)
                    if status == 500:
                        self.assertIn("SSL_CERT_FILE", answer["error"]["message"])
            self.assertEqual(tunnel.places, ["localhost:%d" % fake.server.server_port])

    def test_a_token_command_is_run_again_after_a_401(self):
        command = "%s -c \"import time; print(time.time_ns())\"" % sys.executable
        r = self.run_proxy([chunk("a"), error_body(401, "Expired.", "UNAUTHENTICATED"), chunk("b"), chunk("c")], gemini_api_key="", gemini_token_command=command)
        self.assertEqual([r.ask(request())[0] for _ in range(3)], [200, 200, 200])
        tokens = [q["headers"]["authorization"] for q in r.fake.requests]
        self.assertEqual([tokens[0] == tokens[1], tokens[1] == tokens[2], tokens[2] == tokens[3]], [True, False, True])

    def test_hostile_requests_leave_nothing_behind(self):
        rng = random.Random(SEED + 3)
        r = self.run_proxy(max_body_bytes=3 << 20)
        errors = io.StringIO()
        handler = logging.StreamHandler(errors)
        log = logging.getLogger("claude_gemini_proxy")
        log.addHandler(handler), log.setLevel(logging.ERROR)
        self.addCleanup(lambda: (log.removeHandler(handler), log.setLevel(logging.CRITICAL)))
        seeds = [post_bytes(case[1]) for case in REQUEST_CASES]
        special = [b"[" * (2 << 20), b'{"model": "m", "max_tokens": %s}' % (b"9" * 5000), b'"\xed\xa0\x80"', rb'{"model":"\ud800","messages":[{"role":"user","content":"\udfff"}]}', b"{}" * 9, b"\x00" * 50]
        seeds += [b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(b) + b for b in special]
        words = [b"\r\n", b"\x00", b"\xff", b"Content-Length: 99\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1", b" ", b"/../", b"%2e%2e", b"{", b"\"", b"HEAD ", b"GET ", b"Expect: 100-continue\r\n", b"0\r\n\r\n", b"\xc3"]
        for i in range(max(150, CASES // 5)):
            data = rng.choice(seeds)
            for _ in range(rng.randrange(4) if i >= len(seeds) else 0):
                at = rng.randrange(min(len(data), 400) + 1)
                data = data[:at] + rng.choice(words) + data[at + rng.randrange(8):]
            try:
                answer = r.raw(data)
            except OSError:
                continue
            self.assertNotIn(b"Traceback", answer)
            status = re.match(rb"HTTP/1\.1 (\d+) ", answer)
            self.assertTrue(not answer or status, (SEED, data[:300], answer[:300]))
            self.assertNotEqual(status and status.group(1), b"500", (SEED, data[:2000], answer[-500:]))
        self.assertEqual(errors.getvalue(), "")
        self.assertTrue(wait_for(lambda: r.server.active == 0))
        self.assertEqual(r.ask(request())[0], 200)


class Tunnel:
    """A company's HTTP proxy that knows CONNECT and nothing else."""

    def __init__(self):
        self.places = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.connect, args=(self.server.accept()[0],), daemon=True).start()

    def connect(self, client):
        head = b""
        while b"\r\n\r\n" not in head:  # Python 3.8 sends it in pieces
            head += client.recv(4096)
        self.places.append(head.split()[1].decode())
        target = socket.create_connection(("127.0.0.1", int(self.places[-1].split(":")[1])))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for a, b in ((client, target), (target, client)):
            threading.Thread(target=self.copy, args=(a, b), daemon=True).start()

    def copy(self, a, b):
        with contextlib.suppress(OSError):
            for data in iter(lambda: a.recv(65536), b""):
                b.sendall(data)
        a.close(), b.close()

    def close(self):
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


# A certificate authority for these tests alone, and localhost's certificate with its key; valid until 2126.
CA = """\
-----BEGIN CERTIFICATE-----
MIIBszCCAVmgAwIBAgIUPosf5OsOoPM1hwZkKr23tFIuHF0wCgYIKoZIzj0EAwIw
JjEkMCIGA1UEAwwbY2xhdWRlX2dlbWluaV9wcm94eSB0ZXN0IENBMCAXDTI2MTEy
MTAyMTMzOFoYDzIxMjYxMDI4MDIxMzM4WjAmMSQwIgYDVQQDDBtjbGF1ZGVfZ2Vt
aW5pX3Byb3h5IHRlc3QgQ0EwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARQhAxn
CN8Yguo8t/ENmWx8yl/X77Ua+/xA/zHwTaysy3QXqjAODz0ygwlMz5JceBMs3Fhj
H2LAo+/WJus6j0jBo2MwYTAdBgNVHQ4EFgQU6GbPHF4Lfv7cEH4tcxmeh5oXTiEw
HwYDVR0jBBgwFoAU6GbPHF4Lfv7cEH4tcxmeh5oXTiEwDwYDVR0TAQH/BAUwAwEB
/zAOBgNVHQ8BAf8EBAMCAgQwCgYIKoZIzj0EAwIDSAAwRQIhAL4GUtNqvbPrxDfs
Fdhp9/deR1KAVH8lbxQEbFlkSNozAiA4ZJb8Ss4NORZF/C5QhxSO9o5/FKX7kzyj
A5mlHpOWrQ==
-----END CERTIFICATE-----
"""
SERVER = """\
-----BEGIN CERTIFICATE-----
MIIBuzCCAWKgAwIBAgIUe2ZUaChupWcbqTHeFGQjrNjGbnwwCgYIKoZIzj0EAwIw
JjEkMCIGA1UEAwwbY2xhdWRlX2dlbWluaV9wcm94eSB0ZXN0IENBMCAXDTI2MTEy
MTAyMTU0MloYDzIxMjYxMDI4MDIxNTQyWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3Qw
WTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATQF0k20OAB9w/FnVj0mBoHawYqXNc1
MDYyAv0mvGVCc/Yo5DmPt330hGYd530WChiU8fPM4u1tc3bNGO5VCsfQo34wfDAa
BgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCQYDVR0TBAIwADATBgNVHSUEDDAK
BggrBgEFBQcDATAdBgNVHQ4EFgQUjRGqW5XebXEV35/a+kLInRbnf24wHwYDVR0j
BBgwFoAU6GbPHF4Lfv7cEH4tcxmeh5oXTiEwCgYIKoZIzj0EAwIDRwAwRAIgSfuD
j4RRykjmQenVRN8KfxGgujZF7Rfcn4kWZ1tOUGgCIBLnPRGym+WjJFJFb5A8XA/r
hV24hqKAV0QnP1uyL/Ri
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg/yLWLRFylNyvXH8M
NEOzP6SFsnJ1kj0Rhfm3TQMXnJyhRANCAATQF0k20OAB9w/FnVj0mBoHawYqXNc1
MDYyAv0mvGVCc/Yo5DmPt330hGYd530WChiU8fPM4u1tc3bNGO5VCsfQ
-----END PRIVATE KEY-----
"""


class Signals(unittest.TestCase):
    """The program as a process: SIGTERM and Ctrl-C."""

    def start(self, fake):
        environment = {"PATH": os.environ["PATH"], "GEMINI_API_KEY": "k", "GEMINI_API_BASE": fake.url, "PORT": "0", "no_proxy": "*",
                       "PYTHONPATH": os.path.dirname(proxy.__file__), "PYTHONPYCACHEPREFIX": compiled().name}
        process = subprocess.Popen([sys.executable, "-m", "claude_gemini_proxy"], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tempfile.gettempdir())
        self.addCleanup(lambda: (process.kill(), process.wait(), process.stderr.close()))
        port = int(re.search(rb"127\.0\.0\.1:(\d+)", process.stderr.readline()).group(1))
        return process, port

    def test_running_answers_finish_and_the_port_is_free_at_once(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with FakeGemini(lambda *args: [chunk("a"), 0.4, chunk("b", finish="STOP")]) as fake:
                process, port = self.start(fake)
                with socket.create_connection(("127.0.0.1", port)) as sock, socket.create_connection(("127.0.0.1", port)) as idle:
                    sock.sendall(post_bytes(request(stream=True), b"Connection: close\r\n"))
                    first = sock.recv(100)
                    process.send_signal(number)
                    time.sleep(0.2)
                    with socket.socket() as again:
                        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        again.bind(("127.0.0.1", port))
                    idle.sendall(post_bytes(request()))
                    self.assertIn(b" 529 ", idle.recv(100))
                    rest = first + b"".join(iter(lambda: sock.recv(65536), b""))
                self.assertIn(b"message_stop", rest)
                self.assertEqual(process.wait(5), 0)

    def test_a_second_signal_ends_at_once(self):
        with FakeGemini(lambda *args: [chunk("a"), "hang"]) as fake:
            process, port = self.start(fake)
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(post_bytes(request(stream=True)))
                sock.recv(100)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
                self.assertIsNone(process.poll())
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(5), 128 + signal.SIGTERM)


# ---- 14. Promises ------------------------------------------------------------------------------------------
@functools.lru_cache(1)
def compiled():
    """A folder for compiled code, so that not each child compiles the proxy anew."""
    return tempfile.TemporaryDirectory()


def child(*args, input_="", script=False, **environment):
    """Run the program in an empty folder with only this environment -> (status, output)."""
    if args[0] == proxy.__file__ and not script:
        args = ("-m", "claude_gemini_proxy") + args[1:]
        environment.update(PYTHONPATH=os.path.dirname(proxy.__file__), PYTHONPYCACHEPREFIX=compiled().name)
    with tempfile.TemporaryDirectory() as folder:
        environment.setdefault("PATH", "/usr/bin:/bin")
        done = subprocess.run([sys.executable, *args], cwd=folder, env=environment, input=input_.encode(),
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
    return done.returncode, done.stdout.decode()


class Promises(unittest.TestCase):

    def test_both_files_import_only_the_standard_library(self):
        for path in (proxy.__file__, __file__):
            with open(path, encoding="utf-8") as file:
                tree = ast.parse(file.read())
            names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            names |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            library = os.path.dirname(os.__file__)
            for name in names - {"claude_gemini_proxy", "__future__"}:
                spec = importlib.util.find_spec(name)
                origin = spec.origin or ""
                self.assertTrue(name in sys.builtin_module_names or origin in ("built-in", "frozen") or origin.startswith(library) and "site-packages" not in origin, (name, origin))

    def test_an_import_does_nothing(self):
        code = ("import sys, threading, logging; sys.path.insert(0, %r); sys.dont_write_bytecode = True; import claude_gemini_proxy;"
                "assert threading.active_count() == 1 and not logging.getLogger().handlers") % os.path.dirname(proxy.__file__)
        self.assertEqual(child("-I", "-c", code), (0, ""))

    def test_settings_have_one_truth(self):
        status, text = child(proxy.__file__, "--help", COLUMNS="500")
        self.assertEqual(status, 0)
        with open(os.path.join(os.path.dirname(proxy.__file__), "README.md"), encoding="utf-8") as file:
            readme = file.read()
        for row in dataclasses.fields(proxy.Config):
            names = ", ".join(name for name, _ in proxy.environment_names(row))
            self.assertIn(names, text)
            cells = "| %s | %s | %s |" % (", ".join("`%s`" % name for name, _ in proxy.environment_names(row)), proxy.shown_default(row), row.metadata["help"])
            self.assertTrue(cells in readme, cells)
        self.assertIn("### %s" % proxy.__version__, readme)

    def test_settings_from_everywhere(self):
        load = lambda env, flags={}, dotenv={}: proxy.load_config(flags, env, dotenv)  # noqa: E731
        self.assertEqual(load({"PORT": "1"}, {"port": "2"}, {"PORT": "3"}).port, 2)
        self.assertEqual(load({"PORT": ""}, {}, {"PORT": "3"}).port, 3)
        self.assertEqual(load({"API_KEYS": '["a", "b"]'}).keys, ("a", "b"))
        self.assertEqual(load({"GEMINI_API_KEY": "a, b", "GOOGLE_API_KEY": "c"}).keys, ("a", "b"))
        self.assertEqual(load({"ANTHROPIC_AUTH_TOKEN": "AIza" + "x" * 35}).keys, ("AIza" + "x" * 35,))
        self.assertEqual(load({"ANTHROPIC_AUTH_TOKEN": "sk-ant-1", "ANTHROPIC_MODEL": "claude-opus-5", "ANTHROPIC_DEFAULT_HAIKU_MODEL": "haiku"}),
                         proxy.Config())
        config = load({"PROXY_LISTEN_ADDR": "127.0.0.9:99", "GEMINI_ENDPOINT": "gem.example", "EMERGENCY_DISABLE_STREAMING": "true",
                       "MODEL_MAP": '{"a*": "gemini-b"}', "MAX_STREAMING_RETRIES": "5"})
        self.assertEqual((config.host, config.port, config.gemini_api_base, config.stream_mode, config.model_map, config.max_retries),
                         ("127.0.0.9", 99, "https://gem.example/v1beta", "replay", (("a*", "gemini-b"),), 5))
        self.assertEqual(load({"GOOGLE_GEMINI_BASE_URL": "http://h:1/"}).gemini_api_base, "http://h:1/v1beta")
        self.assertEqual(proxy.parse_dotenv("# c\nexport A='x # y'\nB=z # c\nC=\"q\"\nnonsense\nD=#\n"), {"A": "x # y", "B": "z", "C": "q", "D": ""})
        for env in ({"PORT": "x"}, {"PORT": "70000"}, {"STREAM_MODE": "x"}, {"MODEL_MAP": "x"}, {"API_KEYS": "x"}, {"DEBUG": "maybe"}, {"PING_INTERVAL": "0"},
                    {"GEMINI_API_BASE": "ftp://x"}, {"GEMINI_API_BASE": "https://user:secret@host/v1"}, {"GEMINI_API_KEY": "two\nlines"}, {"HOST": "0.0.0.0"}, {"MAX_RETRIES": "-1"}, {"MODEL_MAP": "[1]"}, {"MODEL_MAP": '{"a": 1}'}):
            with self.assertRaises(ValueError, msg=env) as caught:
                load(env)
            self.assertIn(next(iter(env)), str(caught.exception))
        for dotenv, text in (({"GEMINI_TOKEN_COMMAND": "x"}, "not taken from .env"), ({"LOG_FILE": "x"}, "not taken from .env"), ({"GEMINI_API_BASE": "http://x"}, "put both in one place")):
            with self.assertRaisesRegex(ValueError, text):
                load({"GEMINI_API_KEY": "k"}, {}, dotenv)
        self.assertEqual(load({}, {}, {"GEMINI_API_BASE": "http://x", "GEMINI_API_KEY": "k"}).gemini_api_base, "http://x")
        self.assertNotIn("s3cret", repr(load({"GEMINI_API_KEY": "s3cret", "PROXY_AUTH_TOKEN": "s3cret"})))

    def test_a_bad_start_is_one_clear_line(self):
        for env, status, text in (({"PORT": "x"}, 2, "PORT must be a whole number from 0 to 65535"), ({}, 2, "--demo"), ({"HOST": "0.0.0.0", "GEMINI_API_KEY": "k"}, 2, "PROXY_AUTH_TOKEN"),
                                  ({"OPENAI_API_KEY": "k"}, 2, "set BIG_MODEL"), ({"UPSTREAM": "openrouter"}, 2, "needs OPENROUTER_API_KEY"), ({"GEMINI_API_KEY": "k", "FALLBACK_MODELS": "openai/x"}, 2, "needs OPENAI_API_BASE")):
            got, output = child(proxy.__file__, **env)
            self.assertEqual(got, status)
            self.assertIn(text, output)
            self.assertNotIn("Traceback", output)
        self.assertEqual(child(proxy.__file__, "--version", script=True), (0, "claude_gemini_proxy %s\n" % proxy.__version__))
        self.assertIn("set -gx ANTHROPIC_BASE_URL http://127.0.0.1:8318", child(proxy.__file__, "env", "fish")[1])
        self.assertIn("export ANTHROPIC_BASE_URL=http://127.0.0.1:9999", child(proxy.__file__, "env", "--port", "9999")[1])
        self.assertIn("http://127.0.0.1:8318", child(proxy.__file__, "env", HOST="0.0.0.0", PROXY_AUTH_TOKEN="t")[1])
        for args in (("env", "--port", "0"), ("env", "nonsense"), ("serve", "extra"), ("--gemini-api-key", "s3cret"), ("--gemini-api-key=s3cret",), ("--po", "1")):
            with contextlib.redirect_stderr(io.StringIO()) as output:
                try:
                    status = proxy.main(args)
                except SystemExit as exc:  # argparse's way out
                    status = exc.code
            self.assertEqual(status, 2, (args, output.getvalue()))
            self.assertNotIn("s3cret", output.getvalue())

    def test_run_and_check_use_the_demo(self):
        code = ("import os, json, urllib.request as u; r = u.Request(os.environ['ANTHROPIC_BASE_URL'] + '/v1/messages', json.dumps({'model': 'claude-x',"
                "'messages': [{'role': 'user', 'content': 'hi'}]}).encode(), {'x-api-key': os.environ['ANTHROPIC_AUTH_TOKEN']});"
                "assert b'demo model' in u.urlopen(r).read() and 'ANTHROPIC_API_KEY' not in os.environ; raise SystemExit(7)")
        self.assertEqual(child(proxy.__file__, "--demo", "run", sys.executable, "-c", code, ANTHROPIC_API_KEY="x"), (7, ""))
        self.assertEqual(child(proxy.__file__, "--demo", "run", "--", "/nowhere", "--port")[0], 127)
        self.assertEqual(proxy.parse_arguments(["--port", "1", "run", "x", "--port", "2"])[1:], (dict(proxy.parse_arguments([])[1], port="1"), ["x", "--port", "2"]))

    def test_check_names_what_to_mend(self):
        def script(body, model_, path):
            forced = body.get("toolConfig", {}).get("functionCallingConfig", {}).get("mode") == "ANY"
            return fake.calls(("get_time", {"city": "Rome"})) if forced else fake.says("ok")
        with FakeGemini(script) as fake, tempfile.TemporaryDirectory() as folder:
            environment = {"GEMINI_API_KEY": "k", "GEMINI_API_BASE": fake.url, "no_proxy": "*"}
            status, output = child(proxy.__file__, "check", "--big-model", "gemini-nope", **environment)
            self.assertEqual(status, 1, output)
            for line in ("FAIL gemini-nope is offered to this key", "FAIL opus -> gemini-nope answers: model: gemini-nope",
                         "FAIL Claude Code is on the PATH: it is not: npm install"):
                self.assertIn(line, output)
            with open(os.path.join(folder, "claude"), "w") as file:
                file.write("#!/bin/sh\necho 9.9.9\n")
            os.chmod(file.name, 0o755)
            status, output = child(proxy.__file__, "check", **dict(environment, PATH=folder + ":/usr/bin:/bin"))
            self.assertEqual((status, fake.refusals, fake.dummies), (0, [], 0), output)
            for line in ("ok   a signed tool call makes its round trip", "9.9.9", "ok   gemini-3.5-flash-lite is offered"):
                self.assertIn(line, output)

    def test_the_readme_example_of_vendoring_runs(self):
        with open(os.path.join(os.path.dirname(proxy.__file__), "README.md"), encoding="utf-8") as file:
            example = re.search(r"```python\n(.*?)```", file.read(), re.S).group(1)
        code = "import sys; sys.dont_write_bytecode = True; sys.path.insert(0, %r)\n%s" % (os.path.dirname(proxy.__file__), example)
        status, output = child("-c", code)
        self.assertEqual(status, 0, output)
        self.assertIn("built-in demo model", output)


# ---- 15. Benchmark -----------------------------------------------------------------------------------------
class CannedGemini:
    """As fast an upstream as sockets allow: reads a request, sends bytes that were made before."""

    def __init__(self):
        usage = {"promptTokenCount": 9000, "candidatesTokenCount": 250, "totalTokenCount": 9250}
        texts = ["A piece of an answer, some words long. " for _ in range(6)]
        chunks = [chunk(t, usage=usage, index=0) for t in texts] + [chunk({"text": "", "thoughtSignature": SIGNATURE}, finish="STOP", usage=usage)]
        frames = [b"data: %s\r\n\r\n" % json.dumps(c).encode() for c in chunks]
        self.frames = [b"%x\r\n%s\r\n" % (len(f), f) for f in frames] + [b"0\r\n\r\n"]
        whole = json.dumps(chunk("".join(texts), finish="STOP", usage=usage)).encode()
        self.whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole
        self.head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.server = socket.create_server(("127.0.0.1", 0), backlog=512)
        print(self.server.getsockname()[1], flush=True)

    def run(self):
        while True:
            sock = self.server.accept()[0]
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        while True:
            head, body = read_message(sock)
            if not head:
                return
            if b"drip" in body[:300]:  # a slow stream: 20 ms between chunks, the time of sending in each
                sock.sendall(self.head)
                for i in range(20):
                    text = json.dumps(chunk("%.6f " % time.monotonic(), **{"finish": "STOP"} if i == 19 else {})).encode()
                    sock.sendall(b"%x\r\ndata: %s\r\n\r\n\r\n" % (len(text) + 10, text))
                    time.sleep(0.02)
                sock.sendall(b"0\r\n\r\n")
            else:
                sock.sendall(self.head + b"".join(self.frames) if b":stream" in head[:200] else self.whole)


def read_message(sock, data=b""):
    """-> (head, body) of one HTTP message with Content-Length or chunks; (b"", b"") at the end."""
    while b"\r\n\r\n" not in data:
        more = sock.recv(1 << 18)
        if not more:
            return b"", b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    pieces, size = [body], len(body)
    while size < int(length.group(1)) if length else not pieces[-1].endswith(b"0\r\n\r\n"):
        pieces.append(sock.recv(1 << 18))
        size += len(pieces[-1])
        if not pieces[-1]:
            return b"", b""
    return head, b"".join(pieces)


def session(turns, tools=24, size=2000):
    """A session as Claude Code sends it: tools, and turns of call and result."""
    properties = {"p%d" % i: {"type": "string", "description": "What this parameter is for, in a sentence."} for i in range(12)}
    tools = [{"name": "Tool%d" % i, "description": "What this tool does. " * 90, "input_schema": {"type": "object", "properties": properties, "required": ["p1"]}}
             for i in range(tools)]
    messages = ["Do it."]
    for i in range(turns):
        messages += [says({"type": "text", "text": "I look at file %d." % i}, uses("toolu_%d" % i, "Tool1", {"p1": "x" * 300})),
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_%d" % i, "content": "line of a file\n" * (size // 15)}]}]
    return request(*messages, tools=tools, system="You are a careful engineer. " * 200, **THINK)


def wire(path, body, port):
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nx-goog-api-key: k\r\nContent-Length: %d\r\n\r\n" % (
        path.encode(), port, len(data)) + data


def burst(port, data, count):
    """Milliseconds of `count` requests, one after another on one connection."""
    out = []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            started = time.perf_counter()
            sock.sendall(data)
            head, _ = read_message(sock)
            out.append((time.perf_counter() - started) * 1000)
            assert head.startswith(b"HTTP/1.1 200"), head
    return out


def at_once(count, act):
    """Run act(n) in `count` threads -> their results."""
    results = [None] * count

    def run(n):
        results[n] = act(n)
    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    [t.start() for t in threads], [t.join() for t in threads]
    return results


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * q))]


def resident(pid, peak=False):
    """MiB of memory of a process (Linux)."""
    try:
        with open("/proc/%d/status" % pid) as file:
            return int(re.search(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", file.read()).group(1)) / 1024
    except OSError:
        return float("nan")


class PassThrough(BaseHTTPRequestHandler):
    """The least that a proxy of the standard library can do: the body goes on, the answer comes back."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    pool = []

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        connection = self.pool.pop() if self.pool else http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        action = "streamGenerateContent?alt=sse" if b'"stream": true' in body[-2000:] else "generateContent"
        connection.request("POST", "/v1beta/models/m:" + action, body, {"Content-Type": "application/json"})
        data = connection.getresponse().read()
        self.pool.append(connection)
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)


def pass_through(upstream):
    server = ThreadingHTTPServer(("127.0.0.1", 0), PassThrough)
    server.daemon_threads, server.upstream = True, upstream
    print(server.server_port, flush=True)
    server.serve_forever()


def started_proxy(port, *program):
    """-> (process, port, milliseconds from start to the first answer)"""
    environment = {"PATH": os.environ["PATH"], "GEMINI_API_KEY": "k", "GEMINI_API_BASE": "http://127.0.0.1:%d/v1beta" % port, "PORT": "0",
                   "no_proxy": "*", "LOG_LEVEL": "error"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = free.getsockname()[1]
    began = time.perf_counter()
    if program[0] == "-m":
        environment.update(PYTHONPATH=os.path.dirname(os.path.abspath(proxy.__file__)), PYTHONPYCACHEPREFIX=compiled().name)
    process = subprocess.Popen([sys.executable, *program, "--port", str(own)], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tempfile.gettempdir())
    while True:
        try:
            burst(own, wire("/v1/messages", request(), own), 1)
            return process, own, (time.perf_counter() - began) * 1000
        except ConnectionError:
            time.sleep(0.002)


def helper_process(call):
    """Run a function of this file that prints its port -> (process, port)."""
    code = "import sys; sys.path.insert(0, %r); sys.dont_write_bytecode = True; import test_proxy as t; t.%s"
    process = subprocess.Popen([sys.executable, "-c", code % (os.path.dirname(os.path.abspath(__file__)), call)], stdout=subprocess.PIPE)
    return process, int(process.stdout.readline())


def bench():
    """Print what the proxy adds to direct requests, and what it needs; asserts nothing."""
    print("%s, Python %s, %d CPUs, claude_gemini_proxy %s" % (platform.platform(), platform.python_version(), os.cpu_count(), proxy.__version__))
    canned, upstream = helper_process("CannedGemini().run()")
    bare, bare_port = helper_process("pass_through(%d)" % upstream)
    for name, program in (("the first time, to compile it", ("-m", "claude_gemini_proxy")), ("as a module", ("-m", "claude_gemini_proxy")), ("as a script", (proxy.__file__,))):
        process, port, first = started_proxy(upstream, *program)
        time.sleep(0.2)
        print("%s: start to first answer %.0f ms, idle %.1f MiB" % (name, first, resident(process.pid)))
        if name != "as a script":
            process.terminate(), process.wait()
    try:
        bench_streams(upstream, port, process.pid)
        bench_latency(upstream, bare_port, port)
    finally:
        process.terminate(), process.wait()
        for helper in (canned, bare):
            helper.kill(), helper.wait(), helper.stdout.close()
    bench_signatures()


def bench_latency(upstream, bare, port):
    print("\none request at a time, median ms (p99)      direct    bare pass-through     the proxy      the proxy adds")
    cases = [("small", request(), 60), ("stream", request(stream=True), 60), ("code, 24 tools", dict(session(0), stream=True), 40),
             ("large, 200 tool turns", session(200, size=4500), 8)]
    cases += [("%d tool turns" % n, session(n), max(4, 800 // n)) for n in (50, 200, 800)]
    for name, body, count in cases:
        action = "streamGenerateContent?alt=sse" if body.get("stream") else "generateContent"
        direct = wire("/v1beta/models/gemini-3.8-flash:" + action, proxy.to_gemini(body, "gemini-3.8-flash", CONFIG).body, upstream)
        ways = ((upstream, direct), (bare, wire("/v1/messages", body, bare)), (port, wire("/v1/messages", body, port)))
        times = [[], [], []]
        for _ in range(9):  # in turns, so that all see the same machine
            for i, (to, data) in enumerate(ways):
                times[i] += burst(to, data, count)
        (d, b, p), (d99, b99, p99) = ([quantile(x, q) for x in times] for q in (0.5, 0.99))
        print("%-34s %8.2f (%5.2f) %8.2f (%5.2f) %8.2f (%5.2f) %9.2f" % ("%s (%d kB)" % (name, len(ways[2][1]) // 1000), d, d99, b, b99, p, p99, p - d))


def bench_streams(upstream, port, pid):
    def rate(n):
        return len(burst(port, wire("/v1/messages", request(stream=True), port), 150))
    started = time.perf_counter()
    total = sum(at_once(8, rate))
    print("\n%.0f small streams a second, 8 at once" % (total / (time.perf_counter() - started)))
    at_once(64, lambda n: burst(port, wire("/v1/messages", request(stream=True), port), 5))
    print("%.1f MiB after 64 at once (peak %.1f)" % (resident(pid), resident(pid, peak=True)))
    print("a dripped stream's delta arrives %.2f ms after it was sent (median)" % quantile(dripped(port, 1), 0.5))
    delays = dripped(port, 200)
    print("200 slow streams at once: first delta %.1f ms after it was sent (median), all deltas %.1f ms" % (
        quantile([d for i, d in enumerate(delays) if i % 20 == 0], 0.5), quantile(delays, 0.5)))


def dripped(port, count):
    """Milliseconds between upstream's sending a chunk and the client's seeing it, over `count` streams."""
    def read(n):
        out, rest = [], b""
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(wire("/v1/messages", request("drip", stream=True), port))
            while not rest.endswith(b"0\r\n\r\n"):
                data = sock.recv(65536)
                now = time.monotonic()
                out += [(now - float(sent)) * 1000 for sent in re.findall(rb'text_delta","text":"([\d.]+) ', data)]
                rest = data
        return out
    return [delay for delays in at_once(count, read) for delay in delays]


def bench_signatures():
    cache = proxy.SignatureCache(100000, 3600, 64 << 20)
    started = time.perf_counter()
    at_once(8, lambda n: [cache.put("toolu_%d_%d" % (n, i), "s" * 400) for i in range(125000)] and None)
    print("\na million signatures by 8 threads in %.1f s; kept %d of %.1f MiB" % (time.perf_counter() - started, cache.size()[0], cache.size()[1] / 2 ** 20))


if __name__ == "__main__":
    os.environ["no_proxy"] = "*"
    logging.getLogger("claude_gemini_proxy").setLevel(logging.CRITICAL)
    if sys.argv[1:2] == ["bench"]:
        bench()
    else:
        unittest.main()
