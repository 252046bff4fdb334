//! Logs: one JSON object per line in ECS field names, with the trace that the event belongs to.
//!
//! Never logged: passwords, tokens, secrets, URLs with credentials, e-mail addresses, bodies.

use std::{fmt, io::Write, sync::Arc};

use http::{HeaderMap, HeaderValue};
use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::{
    Event, Subscriber, error,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{EnvFilter, Layer, layer::Context, prelude::*, registry::LookupSpan};

/// The header of requests and messages that says in which step of which trace they were sent.
pub const PARENT_HEADER: &str = "traceparent";
/// The header with what tracing systems add to that for each other.
pub const STATE_HEADER: &str = "tracestate";
/// The longest `tracestate` that is passed on, and the most entries: what W3C asks of everybody.
const LONGEST_STATE: usize = 512;
const MOST_ENTRIES: usize = 32;

tokio::task_local! {
    static TRACE: TraceContext;
}

/// Where an event belongs: a W3C trace context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: u128,
    span_id: u64,
    flags: u8,
    /// The `tracestate` of the sender, which is passed on as it came.
    state: Option<Arc<str>>,
}

impl TraceContext {
    /// A trace of its own.
    pub fn root() -> Self {
        Self {
            trace_id: rand::random_range(1..=u128::MAX),
            span_id: new_span_id(),
            flags: 1,
            state: None,
        }
    }

    /// The trace that the sender of these headers was in, continued; a new one if it sent none.
    pub fn continued(headers: &HeaderMap) -> Self {
        let parent = headers.get(PARENT_HEADER).and_then(|value| value.to_str().ok());
        // A list, which may be spread over several headers.
        let state: Result<Vec<_>, _> = headers
            .get_all(STATE_HEADER)
            .iter()
            .map(HeaderValue::to_str)
            .collect();
        Self::following(parent, state.ok().map(|entries| entries.join(",")).as_deref())
    }

    /// The trace of this `traceparent` and `tracestate`, continued; a new one if there is none that can be read. A state that
    /// cannot be passed on is left out.
    pub fn following(traceparent: Option<&str>, tracestate: Option<&str>) -> Self {
        let Some(sent) = traceparent.and_then(Self::parse) else {
            return Self::root();
        };
        Self {
            state: tracestate.filter(|state| is_state(state)).map(Arc::from),
            ..sent.child()
        }
    }

    /// Reads a `traceparent`.
    pub fn parse(header: &str) -> Option<Self> {
        let mut parts = header.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lower_hex = |part: &str, length| {
            part.len() == length && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let shape =
            lower_hex(version, 2) && lower_hex(trace, 32) && lower_hex(span, 16) && lower_hex(flags, 2);
        // Later versions may append fields; version 00 may not, and ff is none.
        if !shape || version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let context = Self {
            trace_id: u128::from_str_radix(trace, 16).ok()?,
            span_id: u64::from_str_radix(span, 16).ok()?,
            flags: u8::from_str_radix(flags, 16).ok()?,
            state: None,
        };
        (context.trace_id != 0 && context.span_id != 0).then_some(context)
    }

    /// A step inside this trace.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            span_id: new_span_id(),
            ..self.clone()
        }
    }

    /// The context of the running task, to be sent on with requests and messages.
    pub fn current() -> Option<Self> {
        TRACE.try_with(Self::clone).ok()
    }

    /// As the headers of a message, by their names.
    pub fn headers(&self) -> Value {
        let state = self.state.iter().map(|state| (STATE_HEADER, state.to_string()));
        std::iter::once((PARENT_HEADER, self.to_string()))
            .chain(state)
            .collect()
    }

    /// Does something in this context.
    pub fn within<T>(&self, action: impl FnOnce() -> T) -> T {
        TRACE.sync_scope(self.clone(), action)
    }

    /// Runs a future in this context.
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        TRACE.scope(self, future).await
    }
}

/// As a `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "00-{:032x}-{:016x}-{:02x}",
            self.trace_id, self.span_id, self.flags
        )
    }
}

/// Whether this is a list of entries `key=value` that is short enough.
fn is_state(state: &str) -> bool {
    let entries = || state.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    state.len() <= LONGEST_STATE
        && state.bytes().all(|byte| matches!(byte, b' '..=b'~'))
        && (1..=MOST_ENTRIES).contains(&entries().count())
        && entries().all(|entry| entry.find('=').is_some_and(|length| length > 0))
}

fn new_span_id() -> u64 {
    rand::random_range(1..=u64::MAX)
}

/// Sends this process's logs to standard output; `RUST_LOG` filters them, `info` by default.
///
/// `service` and `stack` stand in each line. A panic is a line, too.
pub fn init(service: &'static str, version: &'static str, stack: String) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sqlx=warn"));
    let ecs = Ecs {
        service,
        version,
        stack,
    };
    tracing_subscriber::registry()
        .with(ecs.with_filter(filter))
        .init();
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let reason = panic.payload_as_str().unwrap_or("unknown");
        error!(
            error.message = reason,
            labels.place = place,
            "a task has panicked"
        );
    }));
}

struct Ecs {
    service: &'static str,
    version: &'static str,
    stack: String,
}

struct Fields(Map<String, Value>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Ecs {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields(Map::new());
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut line = Fields(Map::new());
        for span in context
            .event_scope(event)
            .into_iter()
            .flat_map(tracing_subscriber::registry::Scope::from_root)
        {
            if let Some(Fields(fields)) = span.extensions().get::<Fields>() {
                line.0.extend(fields.clone());
            }
        }
        event.record(&mut line);
        let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        let metadata = event.metadata();
        line.set("@timestamp", now);
        line.set("ecs.version", "8.17");
        line.set("log.level", metadata.level().as_str().to_lowercase());
        line.set("log.logger", metadata.target());
        line.set("service.name", self.service);
        line.set("service.version", self.version);
        line.set("labels.stack", self.stack.as_str());
        if let Some(TraceContext {
            trace_id, span_id, ..
        }) = TraceContext::current()
        {
            line.set("trace.id", format!("{trace_id:032x}"));
            line.set("span.id", format!("{span_id:016x}"));
        }
        let mut text = Value::Object(line.0).to_string();
        text.push('\n');
        // Nobody is left to tell when standard output is gone.
        let _ = std::io::stdout().lock().write_all(text.as_bytes());
    }
}

impl Fields {
    fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.0.insert(name.to_owned(), value.into());
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field.name(), value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field.name(), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field.name(), value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field.name(), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_context_survives_its_header() {
        let header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = TraceContext::parse(header).unwrap();
        assert_eq!(context.to_string(), header);
        let child = context.child();
        assert_eq!(child.trace_id, context.trace_id);
        assert_ne!(child.span_id, context.span_id);
    }

    #[test]
    fn the_state_of_a_trace_goes_on_as_it_came() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let mut sent = HeaderMap::new();
        sent.insert(PARENT_HEADER, HeaderValue::from_static(parent));
        sent.append(
            STATE_HEADER,
            HeaderValue::from_static("vendor=a:1;b=2, other@x=3"),
        );
        sent.append(STATE_HEADER, HeaderValue::from_static("third=4"));
        let headers = TraceContext::continued(&sent).child().headers();
        assert_eq!(headers[STATE_HEADER], "vendor=a:1;b=2, other@x=3,third=4");
        let (parent, state) = (headers[PARENT_HEADER].as_str(), headers[STATE_HEADER].as_str());
        let received = TraceContext::following(parent, state);
        assert_eq!(received.headers()[STATE_HEADER], headers[STATE_HEADER]);
        sent.append(STATE_HEADER, HeaderValue::from_bytes(b"fourth=\xff").unwrap());
        assert_eq!(TraceContext::continued(&sent).state, None);
    }

    #[test]
    fn a_state_that_cannot_go_on_is_left_out() {
        let parent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        let of_length = |length: usize| format!("k={}", "v".repeat(length - 2));
        let entries = |number| {
            (0..number)
                .map(|key| format!("k{key}=v"))
                .collect::<Vec<_>>()
                .join(",")
        };
        for good in [of_length(512), entries(32), "a=b,,c=d".to_owned()] {
            let context = TraceContext::following(parent, Some(&good));
            assert_eq!(context.state.as_deref(), Some(&*good));
            // It belongs to its trace.
            for parent in [None, Some("00-0af7-b7ad6b7169203331-01")] {
                assert_eq!(TraceContext::following(parent, Some(&good)).state, None);
            }
        }
        for bad in [
            of_length(513),
            entries(33),
            String::new(),
            ",".to_owned(),
            "k".to_owned(),
            "=v".to_owned(),
            "k=v\r\nx: y".to_owned(),
            "k=ß".to_owned(),
        ] {
            let context = TraceContext::following(parent, Some(&bad));
            assert_eq!(context.state, None, "{bad}");
            assert_eq!(context.headers()[STATE_HEADER], Value::Null);
        }
    }

    #[test]
    fn malformed_trace_contexts_are_ignored() {
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
        }
        assert!(TraceContext::parse("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x").is_some());
    }
}
