//! Reads requests from the bodies of invocations, and writes answers.
//!
//! JSON: `{"pixels": […]}`, `{"image": "<base64>"}`, `{"prompt": "…", "max_tokens": 64, …}`, or
//! `{"instances": […]}` with several of them. JSON lines: one such object a line. CSV: one image a
//! line. PNG, JPEG and plain text: the body is the image or the prompt.

use algorithms::{GenerateInput, ImageInput, Request, RequestError, Response};
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Most requests in one body: more should be several bodies, or a batch job.
pub const REQUESTS_MAX: usize = 1024;
/// Generated tokens unless the request says otherwise.
const MAX_TOKENS_DEFAULT: u32 = 64;
/// Most tokens that the requests of one body may ask for together: they hold the model for minutes.
const BODY_TOKENS_MAX: u64 = 64 << 10;
// A full body that leaves the number of tokens to us is never too much.
const _: () = assert!(REQUESTS_MAX as u64 * MAX_TOKENS_DEFAULT as u64 <= BODY_TOKENS_MAX);

/// JSON form of one request, or of several. Read without an intermediate value: a tree of JSON
/// values takes sixteen times the memory of the text.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "an object with `pixels`, `image`, `prompt` or `instances`"
)]
struct RequestDocument {
    pixels: Option<Vec<f32>>,
    image: Option<String>,
    prompt: Option<String>,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    seed: Option<u64>,
    stream: Option<bool>,
    instances: Option<Instances>,
}

/// Several requests; a mistake says in which.
#[derive(Debug, PartialEq)]
struct Instances(Vec<RequestDocument>);

impl<'de> Deserialize<'de> for Instances {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Instances;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of requests")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Instances, A::Error> {
                let mut documents = Vec::new();
                loop {
                    let at = documents.len();
                    match list.next_element::<RequestDocument>() {
                        Ok(None) => return Ok(Instances(documents)),
                        Ok(Some(document)) => documents.push(document),
                        Err(error) => {
                            let text = api::document::with_suggestion(&error.to_string());
                            return Err(A::Error::custom(format!("instances[{at}]: {text}")));
                        }
                    }
                    check_count(documents.len(), "instances").map_err(A::Error::custom)?;
                }
            }
        }
        deserializer.deserialize_seq(List)
    }
}

/// A parsed body.
#[derive(Debug, PartialEq)]
pub struct Body {
    /// What is asked, in order; never empty.
    pub requests: Vec<Request>,
    /// How the answers are wrapped.
    pub form: BodyForm,
    /// Whether the text should be streamed.
    pub stream: bool,
}

/// How several answers are wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyForm {
    /// One request, one JSON object.
    Single,
    /// `{"predictions": […]}`.
    Instances,
    /// One JSON object a line.
    Lines,
    /// `label,probability` a line.
    Csv,
}

/// Reads the requests of a body. `accepted` lists the model's content types.
pub fn parse_request(
    content_type: &str,
    body: &[u8],
    accepted: &[String],
) -> Result<Vec<Request>, RequestError> {
    Ok(parse_body(content_type, body, accepted)?.requests)
}

/// Whether the model reads this content type.
pub fn accepts(content_type: &str, accepted: &[String]) -> bool {
    let media = media_type(content_type);
    accepted.iter().any(|known| {
        known == &media
            || known == "application/jsonlines" && media == "application/x-ndjson"
            || known.strip_suffix("/*").is_some_and(|kind| {
                media.strip_prefix(kind).is_some_and(|rest| rest.starts_with('/'))
            })
    })
}

fn media_type(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_lowercase()
}

/// Reads a whole body.
pub fn parse_body(
    content_type: &str,
    body: &[u8],
    accepted: &[String],
) -> Result<Body, RequestError> {
    if !accepts(content_type, accepted) {
        return Err(RequestError(format!(
            "content type `{content_type}` is not one this model reads: {}",
            accepted.join(", ")
        )));
    }
    let one = |request| Body { requests: vec![request], form: BodyForm::Single, stream: false };
    match media_type(content_type).as_str() {
        "application/json" => parse_json(body),
        "application/jsonlines" | "application/x-ndjson" => parse_lines(body),
        "text/csv" => parse_csv(body),
        "text/plain" => {
            let prompt = utf8(body)?.to_owned();
            Ok(one(Request::Generate(generate(prompt, None, None, None, None))))
        }
        _ => Ok(one(Request::Image(ImageInput::Encoded(body.to_vec())))),
    }
}

fn utf8(body: &[u8]) -> Result<&str, RequestError> {
    std::str::from_utf8(body).map_err(|e| {
        RequestError(format!("the body is not UTF-8 from byte {} on", e.valid_up_to()))
    })
}

fn parse_json(body: &[u8]) -> Result<Body, RequestError> {
    let mut parsed = read_document(body).map_err(|error| match error {
        Unreadable::NotJson(text) => RequestError(format!("the body is not JSON: {text}")),
        Unreadable::Mistake(text) => RequestError(text),
    })?;
    let Some(Instances(documents)) = parsed.instances.take() else {
        let (request, stream) = document(parsed, "")?;
        return Ok(Body { requests: vec![request], form: BodyForm::Single, stream });
    };
    check_count(documents.len(), "instances")?;
    if parsed != RequestDocument::default() {
        return Err(RequestError("expected nothing beside `instances`".into()));
    }
    let requests: Result<Vec<Request>, RequestError> = documents
        .into_iter()
        .enumerate()
        .map(|(at, parsed)| document(parsed, &format!("instances[{at}]: ")).map(|(r, _)| r))
        .collect();
    Ok(Body { requests: requests?, form: BodyForm::Instances, stream: false })
}

enum Unreadable {
    NotJson(String),
    Mistake(String),
}

fn read_document(text: &[u8]) -> Result<RequestDocument, Unreadable> {
    serde_json::from_slice(text).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => {
            Unreadable::Mistake(api::document::with_suggestion(&error.to_string()))
        }
        _ => Unreadable::NotJson(error.to_string()),
    })
}

fn parse_lines(body: &[u8]) -> Result<Body, RequestError> {
    let mut requests = Vec::new();
    for (at, line) in utf8(body)?.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        check_count(requests.len() + 1, "lines")?;
        let at = format!("line {}: ", at + 1);
        let parsed = read_document(line.as_bytes()).map_err(|error| match error {
            Unreadable::NotJson(text) => RequestError(format!("{at}not JSON: {text}")),
            Unreadable::Mistake(text) => RequestError(format!("{at}{text}")),
        })?;
        requests.push(document(parsed, &at)?.0);
    }
    check_count(requests.len(), "lines")?;
    Ok(Body { requests, form: BodyForm::Lines, stream: false })
}

fn parse_csv(body: &[u8]) -> Result<Body, RequestError> {
    let mut requests = Vec::new();
    for (at, line) in utf8(body)?.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        check_count(requests.len() + 1, "rows")?;
        let pixels: Result<Vec<f32>, RequestError> = line
            .split(',')
            .enumerate()
            .map(|(column, cell)| {
                cell.trim().parse().map_err(|_| {
                    RequestError(format!(
                        "row {}, column {}: `{}` is not a number",
                        at + 1,
                        column + 1,
                        cell.trim().chars().take(40).collect::<String>()
                    ))
                })
            })
            .collect();
        let mut pixels = pixels?;
        pixels.shrink_to_fit();
        requests.push(Request::Image(ImageInput::Pixels(pixels)));
    }
    check_count(requests.len(), "rows")?;
    Ok(Body { requests, form: BodyForm::Csv, stream: false })
}

fn check_count(count: usize, what: &str) -> Result<(), RequestError> {
    match count {
        0 => Err(RequestError(format!("the body holds no {what}"))),
        1..=REQUESTS_MAX => Ok(()),
        _ => Err(RequestError(format!("the body holds more than {REQUESTS_MAX} {what}"))),
    }
}

/// Refuses a body whose requests ask for more tokens than one body may.
pub fn check_tokens(requests: &[Request]) -> Result<(), RequestError> {
    let tokens = |request: &Request| match request {
        Request::Generate(input) => u64::from(input.max_tokens),
        Request::Image(_) => 0,
    };
    let asked: u64 = requests.iter().map(tokens).sum();
    if asked <= BODY_TOKENS_MAX {
        return Ok(());
    }
    Err(RequestError(format!(
        "the body asks for {asked} tokens (the sum of `max_tokens`), expected at most \
         {BODY_TOKENS_MAX}: send several bodies"
    )))
}

fn document(parsed: RequestDocument, at: &str) -> Result<(Request, bool), RequestError> {
    if parsed.instances.is_some() {
        return Err(RequestError(format!("{at}`instances` must be the whole body")));
    }
    let stream = parsed.stream.unwrap_or(false);
    let request = match (parsed.pixels, parsed.image, parsed.prompt) {
        (Some(mut pixels), None, None) => {
            // It grew by doubling, and may wait in the queue for a while.
            pixels.shrink_to_fit();
            Request::Image(ImageInput::Pixels(pixels))
        }
        (None, Some(image), None) => {
            let bytes =
                base64(&image).ok_or_else(|| RequestError(format!("{at}`image` is not base64")))?;
            Request::Image(ImageInput::Encoded(bytes))
        }
        (None, None, Some(prompt)) => Request::Generate(generate(
            prompt,
            parsed.max_tokens,
            parsed.temperature,
            parsed.top_k,
            parsed.seed,
        )),
        _ => {
            return Err(RequestError(format!(
                "{at}expected exactly one of `pixels`, `image` and `prompt`"
            )));
        }
    };
    Ok((request, stream))
}

fn generate(
    prompt: String,
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    seed: Option<u64>,
) -> GenerateInput {
    GenerateInput {
        prompt,
        max_tokens: max_tokens.unwrap_or(MAX_TOKENS_DEFAULT),
        temperature: temperature.unwrap_or(1.0),
        top_k,
        seed: seed.unwrap_or(0),
    }
}

/// Standard base64 (RFC 4648, section 4), with or without padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let text = text.trim_end_matches('=').as_bytes();
    if text.len() % 4 == 1 {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    for group in text.chunks(4) {
        let mut word = 0u32;
        for c in group {
            word = word << 6 | u32::from(digit(*c)?);
        }
        word <<= 6 * (4 - group.len());
        bytes.extend_from_slice(&word.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

/// One request as the JSON document that [`parse_request`] reads. Encoded images are not supported:
/// they are sent as they are.
pub fn request_json(request: &Request) -> String {
    let mut document = serde_json::Map::new();
    match request {
        Request::Image(ImageInput::Pixels(pixels)) => {
            document.insert("pixels".into(), pixels.clone().into());
        }
        Request::Image(ImageInput::Encoded(_)) => {}
        Request::Generate(input) => {
            document.insert("prompt".into(), input.prompt.clone().into());
            document.insert("max_tokens".into(), input.max_tokens.into());
            document.insert("temperature".into(), f64::from(input.temperature).into());
            document.insert("seed".into(), input.seed.into());
            if let Some(top_k) = input.top_k {
                document.insert("top_k".into(), top_k.into());
            }
        }
    }
    serde_json::Value::Object(document).to_string()
}

/// The answers' body and its content type.
pub fn write_answers(form: BodyForm, answers: &[Response]) -> (&'static str, String) {
    let json = |answer: &Response| serde_json::to_string(answer).unwrap_or_default();
    match form {
        BodyForm::Single => ("application/json", answers.first().map(json).unwrap_or_default()),
        BodyForm::Instances => {
            let body = serde_json::json!({ "predictions": answers }).to_string();
            ("application/json", body)
        }
        BodyForm::Lines => {
            let body = answers.iter().map(|answer| json(answer) + "\n").collect();
            ("application/jsonlines", body)
        }
        BodyForm::Csv => {
            let body = answers
                .iter()
                .map(|answer| match answer {
                    Response::Class { label, probability, .. } => {
                        format!("{label},{probability}\n")
                    }
                    Response::Text { text, .. } => json_string(text) + "\n",
                })
                .collect();
            ("text/csv", body)
        }
    }
}

fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn types() -> Vec<String> {
        ["application/json", "application/jsonlines", "text/csv", "text/plain", "image/png"]
            .map(String::from)
            .to_vec()
    }

    fn parse(content_type: &str, body: &str) -> Result<Body, String> {
        parse_body(content_type, body.as_bytes(), &types()).map_err(|e| e.0)
    }

    #[test]
    fn every_form_is_read() {
        let pixels = |v: &[f32]| Request::Image(ImageInput::Pixels(v.to_vec()));
        let body = parse("application/json; charset=utf-8", r#"{"pixels":[1,2]}"#).expect("valid");
        assert_eq!((body.requests, body.form), (vec![pixels(&[1.0, 2.0])], BodyForm::Single));
        let body = parse("application/json", r#"{"instances":[{"pixels":[1]},{"pixels":[2]}]}"#);
        assert_eq!(body.expect("valid").requests, vec![pixels(&[1.0]), pixels(&[2.0])]);
        let body = parse("text/csv", "1, 2\n\n3,4\n").expect("valid");
        assert_eq!(body.requests, vec![pixels(&[1.0, 2.0]), pixels(&[3.0, 4.0])]);
        let body = parse("application/x-ndjson", "{\"prompt\":\"a\",\"seed\":3}\n").expect("valid");
        let Request::Generate(input) = &body.requests[0] else { panic!("{body:?}") };
        assert_eq!((input.prompt.as_str(), input.seed), ("a", 3));
        let body = parse("application/json", r#"{"image":"aGVsbG8="}"#).expect("valid");
        let expected = Request::Image(ImageInput::Encoded(b"hello".to_vec()));
        assert_eq!(body.requests, vec![expected]);
    }

    #[test]
    fn mistakes_say_where_and_what() {
        for (content_type, body, expected) in [
            ("application/json", "{", "not JSON"),
            ("application/json", "{}", "exactly one of"),
            ("application/json", r#"{"pixel":[1]}"#, "did you mean `pixels`?"),
            ("application/json", r#"{"instances":[]}"#, "no instances"),
            ("application/json", r#"{"instances":[{"prompt":1}]}"#, "instances[0]"),
            ("application/json", r#"{"instances":[{"pixels":[1]},{"pixel":[2]}]}"#, "[1]: unknown"),
            ("application/json", r#"{"instances":[{"pixel":[1]}]}"#, "did you mean `pixels`?"),
            ("application/json", r#"{"instances":[{"instances":[]}]}"#, "whole body"),
            (
                "application/json",
                r#"{"instances":[{"prompt":"a"}],"seed":1}"#,
                "beside `instances`",
            ),
            ("application/json", "[1]", "expected"),
            ("application/jsonlines", "{\"prompt\":\"a\"}\n{\"pixel\":[1]}\n", "line 2: unknown"),
            ("application/json", r#"{"image":"?"}"#, "not base64"),
            ("application/jsonlines", "{\"prompt\":\"a\"}\nx\n", "line 2"),
            ("text/csv", "1,2\n3,x\n", "row 2, column 2: `x`"),
            ("application/xml", "<a/>", "not one this model reads"),
        ] {
            let error = parse(content_type, body).expect_err(body);
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn one_body_asks_for_a_bounded_number_of_requests_and_tokens() {
        let several = |count: usize, document: &str| {
            let documents = vec![document; count].join(",");
            parse("application/json", &format!(r#"{{"instances":[{documents}]}}"#))
        };
        let full = several(REQUESTS_MAX, r#"{"prompt":"a"}"#).expect("as many as there may be");
        assert_eq!(check_tokens(&full.requests), Ok(()));
        let error = several(REQUESTS_MAX + 1, r#"{"prompt":"a"}"#).expect_err("one more");
        assert!(error.contains("more than 1024 instances"), "{error}");
        let greedy = several(1024, r#"{"prompt":"a","max_tokens":8192}"#).expect("well-formed");
        let error = check_tokens(&greedy.requests).expect_err("too many tokens").0;
        assert!(error.contains("8388608") && error.contains("at most 65536"), "{error}");
    }

    #[test]
    fn what_is_written_is_read_back() {
        let input = generate("say \"hi\"".into(), Some(5), Some(0.5), Some(3), Some(9));
        let request = Request::Generate(input);
        let text = request_json(&request);
        let requests = parse_request("application/json", text.as_bytes(), &types());
        assert_eq!(requests.expect("valid"), vec![request]);
    }
}
